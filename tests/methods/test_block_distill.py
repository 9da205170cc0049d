"""Blockwise distillation: what is kept of a few layers comes closer to the dense model, or stays as it was."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner.data.windows import IGNORED, load_windows
from LLMPruner.evaluator.ppl import perplexity
from LLMPruner.methods import apply
from LLMPruner.methods.apply import apply_plan
from LLMPruner.methods.block_distill import (
    FLOOR,
    STRIDE,
    HiddenStates,
    NextTokens,
    _log_distances,
    distill_block,
    training_order,
)
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.head import Head
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan

CALIBRATION = random_windows(20, 16, seed=1)
# Layers of the tiny model; only the head comes behind the last.
MIDDLE, LAST, ALL = range(1, 3), range(2, 4), range(4)


def halved(geometry) -> PruningPlan:
    return PruningPlan(geometry, (LayerPlan((1,), tuple(range(0, geometry.intermediate_size, 2))),) * geometry.num_layers)


def layer_of(runner: LayerRunner, index: int) -> torch.nn.Module:
    with runner.store.layer(index) as layer:
        return layer


def taught(dtype=torch.float32, trainable=True, layers=MIDDLE, **changes):
    """What distills `layers` of a model to what they gave before their weights were disturbed."""
    model = tiny_model(**changes).to(dtype).requires_grad_(trainable)
    runner = LayerRunner.of(model)
    inputs = runner.layers(runner.embed(CALIBRATION), 0, layers.start)
    targets = runner.layers(inputs, layers.start, layers.stop)
    torch.manual_seed(0)
    with torch.no_grad():
        for index in layers:
            for weight in layer_of(runner, index).parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    outputs = runner.layers(inputs, layers.start, layers.stop)
    return runner, before, inputs, outputs, targets


def distilled(
    runner, inputs, outputs, targets, *, epochs=4, held=4, seed=0, layers=MIDDLE, windows=CALIBRATION, labels=0.0, **options
):
    held_out = torch.zeros(CALIBRATION.shape, dtype=torch.bool)
    held_out[held - 1 :: held] = True
    order = training_order(held_out, epochs, torch.Generator().manual_seed(seed))
    goal = NextTokens(held_out, windows, labels) if layers.stop == ALL.stop else HiddenStates(held_out)
    found = distill_block(runner, layers, inputs, outputs, targets, goal, order=order, **options)
    if isinstance(goal, HiddenStates):
        return found
    given = runner.layers(inputs, layers.start, layers.stop)
    torch.testing.assert_close(found, given[held_out.any(1)], msg="of what it is judged by alone", equal_nan=True)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_architecture
def test_the_layers_come_closer_to_their_targets_on_windows_held_out(changes, dtype):
    runner, before, inputs, outputs, targets = taught(dtype, **changes)
    found = distilled(runner, inputs, outputs, targets)
    distances = [(hidden - targets)[3::4].float().norm() for hidden in (found, outputs)]
    assert distances[0] < 0.8 * distances[1]
    assert torch.equal(found, runner.layers(inputs, 1, 3)), "what the weights give"
    changed = {name for name, weight in runner.store.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_architecture
def test_the_last_layers_come_closer_to_the_words_of_the_dense_model(changes, dtype):
    """What the head cannot tell apart does not count."""
    runner, before, inputs, outputs, targets = taught(dtype, layers=LAST, **changes)
    # Scaled targets say the same words, for the norm takes the scale away, while the hidden states' distance is large.
    found = distilled(runner, inputs, outputs, 3 * targets, epochs=8, layers=LAST)
    divergences = [runner.head.divergence(hidden[3::4], targets[3::4]) for hidden in (found, outputs)]
    assert divergences[0] < 0.8 * divergences[1]
    assert (found - targets).float().norm() < (found - 3 * targets).float().norm(), "the scale is not learned"
    changed = {name for name, weight in runner.store.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)


@pytest.mark.parametrize(
    ("changes", "dtype"), [*((changes, torch.float32) for changes in ARCHITECTURES.values()), ({}, torch.bfloat16)], ids=str
)
def test_of_all_layers_together_only_output_projections_and_norms_learn(changes, dtype):
    """From the first hidden states to the last, by the words of the dense model."""
    runner, before, inputs, outputs, targets = taught(dtype, layers=ALL, **changes)
    found = distilled(runner, inputs, outputs, targets, layers=ALL, epochs=8)
    divergences = [runner.head.divergence(hidden[3::4], targets[3::4]) for hidden in (found, outputs)]
    assert divergences[0] < 0.9 * divergences[1]
    assert torch.equal(found, runner.layers(inputs))
    changed = {name for name, weight in runner.store.model.named_parameters() if not torch.equal(weight, before[name])}
    ends = ("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias", "layernorm.weight")
    assert changed and all(name.startswith("model.layers.") and name.endswith(ends) for name in changed)
    assert all(any(name.startswith(f"model.layers.{index}.") for name in changed) for index in ALL)
    assert {(weight.dtype, weight.requires_grad) for weight in runner.store.model.parameters()} == {(dtype, True)}


@pytest.mark.parametrize("dtype, trainable", [(torch.float32, True), (torch.bfloat16, False)])
def test_the_model_is_left_as_a_model(dtype, trainable):
    runner, _, *streams = taught(dtype, trainable)
    distilled(runner, *streams)
    weights = list(runner.store.model.parameters())
    assert {(weight.dtype, weight.requires_grad, weight.grad) for weight in weights} == {(dtype, trainable, None)}


@pytest.mark.parametrize("layers", [MIDDLE, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_worse_on_windows_held_out_is_taken_back(dtype, layers, caplog):
    """Held-out targets that contradict the others: the healed weights come back to the last bit."""
    caplog.set_level(logging.INFO, "LLMPruner")
    runner, before, inputs, outputs, targets = taught(dtype, layers=layers)
    targets[3::4] = 1.2 * outputs[3::4]
    assert torch.equal(distilled(runner, inputs, outputs, targets, layers=layers), outputs)
    assert all(torch.equal(weight, before[name]) for name, weight in runner.store.model.named_parameters())
    assert "not kept" in caplog.text


@pytest.mark.parametrize(("distance", "enough"), [(0.009, True), (0.011, False)])
def test_a_block_that_is_near_enough_learns_nothing(distance, enough, caplog):
    """On windows held out, within the loss's floor, relative to the target's square; the others may be far."""
    caplog.set_level(logging.INFO, "LLMPruner")
    runner, before, inputs, outputs, _ = taught()
    targets = outputs.clone()
    targets[3::4] = outputs[3::4] / (1 + distance**0.5)
    targets[::4] = 0.9 * outputs[::4] + 0.5 * outputs.std() * torch.randn_like(outputs[::4])
    distilled(runner, inputs, outputs, targets)
    same = all(torch.equal(weight, before[name]) for name, weight in runner.store.model.named_parameters())
    assert ("need no distillation" in caplog.text) == enough
    assert same == (enough or "not kept" in caplog.text)


def test_the_last_layers_are_judged_by_words_and_not_by_hidden_states():
    """What lies further from hidden states but gives their words is nearer, and what is near them without is not."""
    runner, _, _, outputs, targets = taught(layers=LAST)
    everything = torch.ones(CALIBRATION.shape, dtype=torch.bool)
    for goal, words in ((NextTokens(everything, CALIBRATION), True), (HiddenStates(everything), False)):
        far, near = (goal.distance(runner, hidden, targets) for hidden in (9 * targets, outputs))
        assert (far < near) == words


def test_every_few_tokens_teach_the_last_layers_their_words_and_others_from_step_to_step(monkeypatch):
    taken, gradient = [], Head.teaching_gradient

    def watched(self, hidden, reference, labels, share):
        taken.append(labels.tolist())
        return gradient(self, hidden, reference, labels, share)

    monkeypatch.setattr(Head, "teaching_gradient", watched)
    runner, _, *streams = taught(layers=LAST)
    windows = torch.arange(CALIBRATION.numel()).view(CALIBRATION.shape) % 97  # which label is which token's shows
    distilled(runner, *streams, layers=LAST, epochs=1, windows=windows)
    for step, labels in enumerate(taken):
        window = training_order_of(1)[step]
        following = [*windows[window, 1:].tolist(), IGNORED]
        assert labels == following[step % STRIDE :: STRIDE]
    assert len(taken) == 15


def training_order_of(epochs: int) -> list[int]:
    held_out = torch.zeros(CALIBRATION.shape, dtype=torch.bool)
    held_out[3::4] = True
    return training_order(held_out, epochs, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", [LAST, ALL])
def test_the_texts_own_next_tokens_are_learned_by_their_share(layers):
    """Of one window said over and over; the hidden states of the layers before the last know nothing of it."""
    windows, losses = CALIBRATION[:1].expand_as(CALIBRATION), []
    for share in (0.0, 0.5, 1.0):
        runner, _, inputs, outputs, targets = taught(layers=layers)
        same = [streams[:1].expand_as(streams) for streams in (inputs, outputs, targets)]
        found = distilled(runner, *same, layers=layers, windows=windows, labels=share, epochs=30)
        losses.append(runner.head.losses(found[:1], windows[:1]).item())
    assert max(losses[1:]) < 0.8 * losses[0]
    weights = []
    for share in (0.0, 1.0):
        runner, _, *streams = taught(layers=MIDDLE)
        distilled(runner, *streams, labels=share)
        weights.append(layer_of(runner, 2).mlp.down_proj.weight)
    assert torch.equal(*weights), "but hidden states are taught by hidden states"


def test_what_is_kept_of_the_last_layers_is_judged_by_what_they_learn():
    runner, _, _, outputs, targets = taught(layers=LAST)
    held_out = torch.ones(CALIBRATION.shape, dtype=torch.bool)
    seen = [hidden.flatten(0, 1)[::STRIDE] for hidden in (outputs, targets)]
    labels = torch.cat([CALIBRATION[:, 1:], torch.full((20, 1), IGNORED)], 1).flatten()[::STRIDE]
    for share in (0.0, 0.25, 1.0):
        found = NextTokens(held_out, CALIBRATION, share).distance(runner, outputs, targets)
        assert found == runner.head.teaching_loss(*seen, labels, share)
    assert NextTokens(held_out, CALIBRATION).distance(runner, outputs, targets) == runner.head.divergence(*seen)


@pytest.mark.parametrize("length", [2, 3, 5, 16])
@pytest.mark.parametrize("windows", [3, 8])
def test_windows_shorter_than_the_stride_teach_too(windows, length, caplog):
    """Of fewer windows than are held out from, the later part of each is held out: maybe the one token that has no label."""
    caplog.set_level(logging.INFO, "LLMPruner")
    taken, gradient = [], Head.teaching_gradient

    def watched(self, hidden, *args):
        taken.append(len(hidden))
        return gradient(self, hidden, *args)

    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "teaching_gradient", watched)
        options = {"windows": CALIBRATION[:windows, :length], "distill_labels": 0.5, "distill_last": 2}
        apply_plan(LayerRunner.of(model), halved(geometry_of(model)), repair="least_squares", distill_model_epochs=4, **options)
    assert len(taken) == 4 * (windows if windows < 4 else windows - windows // 4) and min(taken) > 0
    assert "layers 2 to 3 distilled: loss against dense" in caplog.text and "nan" not in caplog.text


@pytest.mark.parametrize("layers", [MIDDLE, LAST])
@pytest.mark.parametrize("held", [4, 20])
def test_windows_held_out_teach_nothing(held, layers):
    weights = []
    for change in (1.0, 1.001):
        runner, _, inputs, outputs, targets = taught(layers=layers)
        targets[held - 1 :: held] += change - 1
        distilled(runner, inputs, outputs, targets, held=held, layers=layers)
        weights.append(layer_of(runner, 2).mlp.down_proj.weight)
    assert torch.equal(*weights)


def test_of_windows_held_out_in_part_only_the_rest_teaches():
    weights = []
    for change in (1.0, 1.001):
        runner, _, inputs, outputs, targets = taught()
        held_out = torch.zeros(CALIBRATION.shape, dtype=torch.bool)
        held_out[:, 12:] = True
        targets[held_out] *= change
        order = training_order(held_out, 4, torch.Generator().manual_seed(0))
        distill_block(runner, range(1, 3), inputs, outputs, targets, HiddenStates(held_out), order=order)
        weights.append(layer_of(runner, 2).mlp.down_proj.weight)
    assert torch.equal(*weights) and not torch.equal(weights[0], layer_of(taught()[0], 2).mlp.down_proj.weight)


def test_every_pass_takes_the_windows_in_a_new_order_drawn_from_the_generator(monkeypatch):
    orders, step = [], LayerRunner.differentiable_layer

    def watched(self, index, hidden):
        if index == 1:
            orders[-1].append(next(i for i, window in enumerate(inputs) if torch.equal(window, hidden[0])))
        return step(self, index, hidden)

    monkeypatch.setattr(LayerRunner, "differentiable_layer", watched)
    for seed in (0, 0, 1):
        runner, _, inputs, *streams = taught()
        orders.append([])
        distilled(runner, inputs, *streams, epochs=2, seed=seed)
    assert orders[0] == orders[1] != orders[2]
    fit = [window for window in range(20) if window % 4 != 3]
    passes = orders[0][:15], orders[0][15:]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1]) == fit


def test_weights_learn_in_float32_while_the_arithmetic_stays_in_half_precision(monkeypatch):
    runner, _, *streams = taught(torch.bfloat16)
    learning, seen, adam, step = [], [], torch.optim.Adam, LayerRunner.differentiable_layer

    def watched(self, index, hidden):
        layer = layer_of(self, index)
        handle = layer.mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        output = step(self, index, hidden)
        handle.remove()
        return output

    monkeypatch.setattr(LayerRunner, "differentiable_layer", watched)
    monkeypatch.setattr(torch.optim, "Adam", lambda weights, **options: learning.extend(weights) or adam(weights, **options))
    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", lambda self: dtypes.update(w.dtype for w in learning))
    dtypes = set()
    distilled(runner, *streams, epochs=1)
    assert dtypes == {torch.float32} and set(seen) == {torch.bfloat16} and len(learning) == 2 * 9


def test_the_distance_of_a_token_is_relative_to_the_size_of_its_target():
    targets = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    found = _log_distances(targets + torch.tensor([[0.0, 5.0], [0.5, 0.0], [0.0, 0.0]]), targets)
    assert (found.exp() - FLOOR).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


def test_a_token_that_stays_far_from_its_target_does_not_outweigh_the_rest():
    """Its distance pulls no more than that of one that is near, and who is near enough is left alone."""
    targets = torch.ones(3, 2)
    far, near, nearest = 10.0, 1.0, 1e-3
    hidden = (targets + torch.tensor([[far], [near], [nearest]])).requires_grad_()
    _log_distances(hidden, targets).sum().backward()
    slopes = hidden.grad[:, 0]
    assert slopes[0] < slopes[1] and slopes[2] < slopes[1]


def test_a_token_that_is_zero_and_should_be_pulls_nothing():
    """Such as the padding token, whose embedding is zero: not a number would be taken back with all that was learned."""
    hidden = torch.zeros(1, 4, requires_grad=True)
    _log_distances(hidden, torch.zeros(1, 4)).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(1, 4))


def test_layers_that_learned_nonsense_are_taken_back(caplog):
    caplog.set_level(logging.INFO, "LLMPruner")
    runner, before, inputs, outputs, targets = taught()
    targets[0] = torch.nan  # a window that teaches
    assert torch.equal(distilled(runner, inputs, outputs, targets), outputs)
    assert all(torch.equal(weight, before[name]) for name, weight in runner.store.model.named_parameters())
    assert "to nan, not kept" in caplog.text


def test_the_seed_reaches_the_order_of_the_windows():
    found = []
    for seed in (1, 1, 2):
        model = tiny_model()
        plan = random_plan(geometry_of(model))
        apply_plan(LayerRunner.of(model), plan, repair="bias", windows=CALIBRATION, distill_epochs=1, seed=seed)
        found.append(model.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_layers_before_the_first_few_that_lost_something_learn_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(apply, "BLOCK", 2)
    monkeypatch.setattr(apply, "distill_block", lambda runner, layers, *args, **options: seen.append(layers) or args[1])
    model = tiny_model()
    plan = PruningPlan.dense(geometry_of(model)).with_layer(2, LayerPlan((0,), (0, 1)))
    apply_plan(LayerRunner.of(model), plan, repair="least_squares", windows=CALIBRATION, distill_epochs=1)
    assert seen == [range(2, 4)]


def test_a_block_without_any_sublayer_left_is_passed_by(monkeypatch):
    monkeypatch.setattr(apply, "BLOCK", 1)
    model = tiny_model()
    plan = PruningPlan.dense(geometry_of(model)).with_layer(0, LayerPlan((0,), (0, 1))).with_layer(3, LayerPlan((), ()))
    apply_plan(LayerRunner.of(model), plan, repair="least_squares", windows=CALIBRATION, distill_epochs=1)
    assert sum(weight.numel() for weight in model.parameters()) == plan.total_params


@pytest.mark.parametrize("repair", ["least_squares", "bias"])
@each_architecture
def test_every_layer_is_distilled_once_between_what_reaches_it_and_what_the_dense_model_gives(monkeypatch, changes, repair):
    """Two layers at a time: the streams given are those of the models, and the next layers are healed on the distilled ones."""
    model, dense = tiny_model(**changes), LayerRunner.of(tiny_model(**changes))
    plan, seen = replace(random_plan(geometry_of(model)), output_bias=repair == "bias"), []

    def watched(runner, layers, inputs, outputs, targets, *args, **options):
        torch.testing.assert_close(targets, dense.layers(dense.embed(CALIBRATION), 0, layers.stop))
        torch.testing.assert_close(inputs, runner.layers(runner.embed(CALIBRATION), 0, layers.start))
        torch.testing.assert_close(outputs, runner.layers(inputs, layers.start, layers.stop))
        seen.append(layers)
        return distill_block(runner, layers, inputs, outputs, targets, *args, **options)

    monkeypatch.setattr(apply, "BLOCK", 2)
    monkeypatch.setattr(apply, "distill_block", watched)
    apply_plan(LayerRunner.of(model), plan, repair=repair, windows=CALIBRATION, distill_epochs=1)
    assert seen == [range(0, 2), range(2, 4)]
    assert sum(weight.numel() for weight in model.parameters()) == plan.total_params


@pytest.mark.parametrize("changes", [{"distill_epochs": 1}, {"distill_model_epochs": 1}], ids=str)
def test_a_dense_plan_is_not_distilled(monkeypatch, changes):
    monkeypatch.setattr(apply, "distill_block", lambda *args, **options: pytest.fail("nothing to learn"))
    model = tiny_model()
    plan = PruningPlan.dense(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan, repair="least_squares", windows=CALIBRATION, **changes)


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_whole_model_is_distilled_last_on_its_own_windows(monkeypatch, epochs):
    """After the blocks, if any, but the last, behind which the head comes: from the windows' embeddings to what the dense model
    gives in the end."""
    model, dense, seen = tiny_model(), LayerRunner.of(tiny_model()), []

    def watched(runner, layers, inputs, outputs, targets, goal, **options):
        if isinstance(goal, NextTokens):
            assert torch.equal(inputs, runner.embed(CALIBRATION))
            torch.testing.assert_close(outputs, runner.layers(inputs))
            torch.testing.assert_close(targets, dense.layers(dense.embed(CALIBRATION)))
            assert torch.equal(goal.windows, CALIBRATION) and goal.labels == 0.25
        fitted = (~goal.held_out).any(1).sum()
        seen.append((layers, type(goal), len(options["order"]) // fitted))
        return distill_block(runner, layers, inputs, outputs, targets, goal, **options)

    monkeypatch.setattr(apply, "BLOCK", 2)
    monkeypatch.setattr(apply, "distill_block", watched)
    options = {"distill_epochs": epochs, "distill_model_epochs": 3, "distill_labels": 0.25}
    apply_plan(LayerRunner.of(model), halved(geometry_of(model)), repair="least_squares", windows=CALIBRATION, **options)
    assert seen == [(range(2), HiddenStates, 1)][:epochs] + [(ALL, NextTokens, 3)]


@pytest.mark.parametrize("last, first", [(None, 0), (1, 3), (3, 1), (10, 0)])
def test_so_many_last_layers_as_are_asked_for_learn_next_tokens_together(monkeypatch, last, first):
    """From what the healed layers before them pass on."""
    seen = []

    def watched(runner, layers, inputs, outputs, targets, goal, **options):
        torch.testing.assert_close(inputs, runner.layers(runner.embed(CALIBRATION), 0, layers.start))
        seen.append((layers, goal.labels))
        return outputs

    monkeypatch.setattr(apply, "distill_block", watched)
    model = tiny_model()
    options = {"windows": CALIBRATION, "distill_model_epochs": 1, "distill_last": last, "distill_labels": 0.5}
    apply_plan(LayerRunner.of(model), halved(geometry_of(model)), repair="least_squares", **options)
    assert seen == [(range(first, 4), 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("removed", [(1, 2), (2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("few", [2, 5])
def test_layers_without_sublayers_are_distilled(monkeypatch, caplog, removed, dtype, few):
    """Whatever they pass on: what stands where one was is as wide as the norm's weights, which learn in float32."""
    caplog.set_level(logging.INFO, "LLMPruner")
    monkeypatch.setattr(apply, "BLOCK", few)
    model = tiny_model().to(dtype)
    attention, mlp = removed
    plan = (
        PruningPlan.dense(geometry_of(model)).with_layer(attention, LayerPlan((), (0, 1))).with_layer(mlp, LayerPlan((0,), ()))
    )
    options = {"windows": CALIBRATION, "distill_epochs": 1, "distill_model_epochs": 1, "distill_labels": 0.5}
    apply_plan(LayerRunner.of(model), plan, repair="least_squares", **options)
    assert "layers 0 to 3 distilled: loss against dense" in caplog.text
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.parametrize("num_layers", range(1, 32))
def test_the_layers_learn_in_blocks_of_which_the_first_is_the_shorter(num_layers):
    blocks = list(apply._blocks(num_layers))
    assert [index for block in blocks for index in block] == list(range(num_layers))
    assert all(len(block) == apply.BLOCK for block in blocks[1:]) and 0 < len(blocks[0]) <= apply.BLOCK


@pytest.mark.parametrize("passes", ["distill_epochs", "distill_model_epochs"])
def test_distillation_lowers_the_perplexity_of_a_repaired_model(monkeypatch, trained_dir, data_dir, tokenizer, passes):
    monkeypatch.setattr(apply, "BLOCK", 2)

    def windows(split, samples):
        return load_windows(tokenizer, "wikitext2", split, seq_len=64, samples=samples, data_dir=str(data_dir))

    source, measured = find_model(str(trained_dir), "--base_model"), []
    for epochs in (0, 4):
        model = load_model(source, dtype="float32", device="cpu").model
        options = {"repair": "least_squares", "windows": windows("train", 60), passes: epochs}
        apply_plan(LayerRunner.of(model), halved(source.geometry), **options)
        measured.append(perplexity(model, windows("test", 40)))
    assert measured[1] < 0.98 * measured[0], measured
