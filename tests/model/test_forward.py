"""The layer runner is the model: same hidden states, same losses, same gradients, whatever the batch and chunk sizes."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, each_architecture, geometry_of, random_plan, random_windows, tiny_model
from LLMPruner.forward import LayerRunner
from torch.nn import functional

from LLMPruner import forward
from LLMPruner.methods.apply import apply_plan

WINDOWS = random_windows(5, 12)


@torch.no_grad()
def naive_losses(model, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return nll.view(len(windows), -1).double().sum(1)


def naive_gates(model, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gate gradients of every token from one plain backward pass: input times its gradient."""
    inputs, handles = [], []

    def keep(_, args):
        args[0].retain_grad()
        inputs.append(args[0])

    for layer in model.model.layers:
        handles += [linear.register_forward_pre_hook(keep) for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    model.zero_grad()
    logits = model(windows).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    gates = [(kept * kept.grad).detach() for kept in inputs]
    return list(zip(gates[::2], gates[1::2], strict=True))


def gathered_gates(runner: LayerRunner, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parts: dict[int, list] = {}
    runner.gate_gradients(windows, lambda index, *gates: parts.setdefault(index, []).append(gates))
    return [tuple(torch.cat(side) for side in zip(*parts[index], strict=True)) for index in range(runner.num_layers)]


@each_architecture
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_hidden_states_and_losses_equal_the_models(changes, pruned):
    model = tiny_model(**changes)
    runner = LayerRunner(model)
    if pruned:
        apply_plan(runner, random_plan(geometry_of(model)))
    hidden = runner.embed(WINDOWS)
    states = model(WINDOWS, output_hidden_states=True).hidden_states
    for index in range(runner.num_layers - 1):  # the model's last hidden state is normed
        torch.testing.assert_close(hidden, states[index])
        hidden = runner.layer(index, hidden)
    hidden = runner.layer(runner.num_layers - 1, hidden)
    torch.testing.assert_close(model.model.norm(hidden), states[-1])
    torch.testing.assert_close(runner.losses(hidden, WINDOWS), naive_losses(model, WINDOWS), rtol=1e-5, atol=1e-5)


def test_an_eager_model_is_causal_too():
    model = tiny_model()
    expected = naive_losses(model, WINDOWS)
    model.set_attn_implementation("eager")
    runner = LayerRunner(model)
    torch.testing.assert_close(runner.losses(runner.layers(runner.embed(WINDOWS)), WINDOWS), expected, rtol=1e-5, atol=1e-5)


def test_a_range_of_layers_is_those_layers():
    runner = LayerRunner(tiny_model())
    hidden = runner.embed(WINDOWS)
    halfway = runner.layers(hidden, 0, 2)
    assert torch.equal(halfway, runner.layer(1, runner.layer(0, hidden)))
    assert torch.equal(runner.layers(halfway, 2), runner.layers(hidden))
    assert torch.equal(runner.layers(hidden, 4), hidden)


@pytest.mark.parametrize("batch_tokens", [1, 24, 36, 10**6])
def test_the_batch_size_changes_nothing(batch_tokens):
    model = tiny_model()
    whole, runner = LayerRunner(model), LayerRunner(model, batch_tokens=batch_tokens)
    expected = whole.layers(whole.embed(WINDOWS))
    hidden = runner.layers(runner.embed(WINDOWS))
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(runner.losses(hidden, WINDOWS), whole.losses(expected, WINDOWS), rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gathered_gates(runner, WINDOWS), gathered_gates(whole, WINDOWS), strict=True):
        torch.testing.assert_close(got, wanted)


def test_batches_cover_every_window_once_and_keep_to_the_size():
    slices = list(LayerRunner(tiny_model(), batch_tokens=30).batches(7, 10))
    assert [index for part in slices for index in range(7)[part]] == list(range(7))
    assert all(part.stop - part.start <= 3 for part in slices)


@pytest.mark.parametrize("rows", [1, 7])
def test_chunking_the_logits_changes_neither_losses_nor_gradients(monkeypatch, rows):
    model = tiny_model()
    runner = LayerRunner(model)
    hidden = runner.layers(runner.embed(WINDOWS))
    losses, gates = runner.losses(hidden, WINDOWS), gathered_gates(runner, WINDOWS)
    other = hidden.roll(1, 0)
    divergence, slope = runner.divergence(other, hidden), runner.divergence_gradient(other[0], hidden[0])
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    monkeypatch.setattr(forward, "LOGIT_ELEMENTS_CPU", rows * VOCAB)
    torch.testing.assert_close(runner.losses(hidden, WINDOWS), losses, rtol=1e-5, atol=1e-5)
    assert runner.divergence(other, hidden) == pytest.approx(divergence, rel=1e-5)
    torch.testing.assert_close(runner.divergence_gradient(other[0], hidden[0]), slope)
    for got, wanted in zip(gathered_gates(runner, WINDOWS), gates, strict=True):
        torch.testing.assert_close(got, wanted)
    assert max(seen) == rows


def test_the_gradient_of_the_divergence_is_that_of_autograd():
    model = tiny_model()
    runner = LayerRunner(model)
    reference, hidden = runner.layers(runner.embed(WINDOWS)).flatten(0, 1).split(20)[:2]
    leaf = hidden.clone().requires_grad_()
    gradient = runner.divergence_gradient(hidden, reference)
    assert all(weight.grad is None for weight in model.parameters()), "nor is the head's, which no pruning changes"
    ours, theirs = (model.lm_head(model.model.norm(rows)).log_softmax(-1) for rows in (leaf, reference))
    (theirs.exp() * (theirs - ours)).sum(-1).mean().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@each_architecture
def test_observers_see_every_input_of_the_output_projection(changes):
    model = tiny_model(**changes)
    layer, seen = model.model.layers[1], {"attention": [], "mlp": []}
    expected = {"attention": [], "mlp": []}
    for name, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
        linear.register_forward_pre_hook(lambda _, args, name=name: expected[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(WINDOWS)
    expected = {name: whole for name, (whole,) in expected.items()}
    runner = LayerRunner(tiny_model(**changes), batch_tokens=24)
    hidden = runner.attention(1, runner.layer(0, runner.embed(WINDOWS)), seen["attention"].append)
    runner.mlp(1, hidden, seen["mlp"].append)
    for name, batches in seen.items():
        assert len(batches) == 3
        torch.testing.assert_close(torch.cat(batches), expected[name])


@each_architecture
def test_gate_gradients_equal_a_plain_backward_pass(changes):
    expected = naive_gates(tiny_model(**changes), WINDOWS)
    for got, wanted in zip(gathered_gates(LayerRunner(tiny_model(**changes)), WINDOWS), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@each_architecture
def test_summed_over_tokens_a_gate_gradient_is_weight_times_gradient_of_its_column(changes):
    model = tiny_model(**changes)
    naive_gates(model, WINDOWS)
    products = [
        [(linear.weight * linear.weight.grad).sum(0).detach() for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        for layer in model.model.layers
    ]
    for gates, wanted in zip(gathered_gates(LayerRunner(model), WINDOWS), products, strict=True):
        for gate, product in zip(gates, wanted, strict=True):
            torch.testing.assert_close(gate.sum((0, 1)), product, rtol=1e-3, atol=1e-5)


def test_no_weight_gradient_is_formed_and_hooks_are_gone_afterwards():
    model = tiny_model()
    gathered_gates(LayerRunner(model), WINDOWS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_an_observer_raised():
    model = tiny_model()
    runner = LayerRunner(model)

    def fail(_):
        raise KeyError("observer")

    with pytest.raises(KeyError):
        runner.mlp(0, runner.embed(WINDOWS), fail)
    assert not any(module._forward_pre_hooks for module in model.modules())
