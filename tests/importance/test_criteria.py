"""Unit scores: the naive definition, their shapes, and that what does nothing goes first."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model
from torch import nn
from torch.nn import functional

from LLMPruner.errors import RunError
from LLMPruner.families.llama import LLAMA
from LLMPruner.families.slicing import output_columns
from LLMPruner.importance.allocation import keep_best_units
from LLMPruner.importance.criteria import CRITERIA, score_units
from LLMPruner.model.forward import LayerRunner

WINDOWS = random_windows(3, 8)


def scored(model, importance: str, windows: torch.Tensor = WINDOWS, seed: int = 0, batch_tokens: int = 4096):
    runner = LayerRunner.of(model, batch_tokens=batch_tokens)
    return score_units(runner, geometry_of(model), importance, windows=windows, seed=seed)


def naive_taylor(model, index: int, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared derivative of a window's loss by a factor on each unit's inputs at each token, by plain autograd."""
    geometry, layer = geometry_of(model), model.model.layers[index]
    groups, channels = torch.zeros(geometry.num_kv_heads), torch.zeros(geometry.intermediate_size)
    for window in windows:
        for linear, sums in ((layer.self_attn.o_proj, groups), (layer.mlp.down_proj, channels)):
            gate = torch.ones(len(window), len(sums), requires_grad=True)
            wide = gate.repeat_interleave(linear.in_features // len(sums), dim=1)
            hook = linear.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide,))
            logits = model(window.unsqueeze(0)).logits[0, :-1]
            loss = functional.cross_entropy(logits, window[1:], reduction="sum")
            sums += torch.autograd.grad(loss, gate)[0].square().sum(0)
            hook.remove()
    return groups / windows.numel(), channels / windows.numel()


@each_architecture
def test_taylor_equals_the_naive_per_token_gates(changes):
    model = tiny_model(**changes)
    naive = [naive_taylor(model, index, WINDOWS) for index in range(4)]
    for scores, (groups, channels) in zip(scored(model, "taylor"), naive, strict=True):
        torch.testing.assert_close(scores.kv_groups, groups, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(scores.channels, channels, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("importance", sorted(CRITERIA))
@each_architecture
def test_every_criterion_scores_every_unit(changes, importance):
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    scores = scored(model, importance)
    assert len(scores) == geometry.num_layers
    for layer in scores:
        assert layer.kv_groups.shape == (geometry.num_kv_heads,) and layer.channels.shape == (geometry.intermediate_size,)
        for values in (layer.kv_groups, layer.channels):
            assert values.dtype == torch.float32 and values.device.type == "cpu" and not values.requires_grad
            assert values.isfinite().all() and len(values.unique()) > 1
            assert (values >= 0).all() or importance == "flap"  # which is standardized


@pytest.mark.parametrize("importance", sorted(set(CRITERIA) - {"random", "magnitude"}))
@each_architecture
def test_a_unit_without_output_weights_goes_first(changes, importance):
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    layer = model.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight[:, output_columns(LLAMA.attention, [1], geometry)] = 0
        layer.mlp.down_proj.weight[:, 17] = 0
    scores = scored(model, importance)
    assert scores[2].kv_groups.argmin() == 1 and scores[2].channels.argmin() == 17
    kept = {(2, "attention"): geometry.num_kv_heads - 1, (2, "mlp"): geometry.intermediate_size - 1}
    plan = keep_best_units(geometry, kept, scores)
    assert 1 not in plan.layers[2].kv_groups and 17 not in plan.layers[2].channels
    assert plan.layers[1].kv_groups == tuple(range(geometry.num_kv_heads)), "what is not asked for stays whole"


def test_magnitude_of_a_unit_is_the_squared_norm_of_all_its_weights():
    model = tiny_model()
    geometry, layer = geometry_of(model), model.model.layers[1]
    scores = scored(model, "magnitude", windows=None)[1]
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys = slice(32, 64), slice(8, 16)  # group 1 of two, 4 query heads of 8
    parts = (attention.q_proj.weight[queries], attention.k_proj.weight[keys], attention.v_proj.weight[keys])
    expected = sum(part.square().sum() for part in (*parts, attention.o_proj.weight[:, queries]))
    torch.testing.assert_close(scores.kv_groups[1], expected.detach())
    expected = sum(part.square().sum() for part in (mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]))
    torch.testing.assert_close(scores.channels[5], expected.detach())
    total = sum(parameter.square().sum() for module in (attention, mlp) for parameter in module.parameters())
    torch.testing.assert_close(scores.kv_groups.sum() + scores.channels.sum(), total.detach())
    assert geometry.num_kv_heads == 2


def test_magnitude_puts_a_unit_of_zeros_last():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[9] = mlp.up_proj.weight[9] = 0
        mlp.down_proj.weight[:, 9] = 0
    assert scored(model, "magnitude")[0].channels.argmin() == 9


def test_random_scores_follow_the_seed_and_differ_between_layers():
    model = tiny_model()
    first, same, other = (scored(model, "random", seed=seed) for seed in (1, 1, 99))
    assert torch.equal(first[0].channels, same[0].channels)
    assert not torch.equal(first[0].channels, other[0].channels) and not torch.equal(first[0].channels, first[1].channels)


def test_taylor_is_a_mean_that_neither_batches_nor_repeated_windows_change():
    model = tiny_model()
    whole = scored(model, "taylor")
    for other in (scored(model, "taylor", batch_tokens=8), scored(model, "taylor", windows=WINDOWS.repeat(2, 1))):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a.kv_groups, b.kv_groups)
            torch.testing.assert_close(a.channels, b.channels)


def test_scoring_leaves_the_weights_as_they_were():
    model, before = tiny_model(), tiny_model()
    for importance in CRITERIA:
        scored(model, importance)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)


def inputs_of(model, index: int, windows: torch.Tensor = WINDOWS) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches o_proj and down_proj of a layer, `(tokens, columns)`, by plain hooks."""
    seen, layer = [], model.model.layers[index]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def test_wanda_is_the_sum_of_weights_times_input_norms():
    model = tiny_model()
    layer, (queries, channels) = model.model.layers[1], inputs_of(model, 1)
    scores = scored(model, "wanda")[1]
    for got, weight, rows in (
        (scores.kv_groups, layer.self_attn.o_proj.weight, queries),
        (scores.channels, layer.mlp.down_proj.weight, channels),
    ):
        naive = (weight.abs() * rows.square().mean(0).sqrt()).sum(0).view(len(got), -1).sum(1)
        torch.testing.assert_close(got, naive.detach(), rtol=1e-4, atol=1e-6)


def test_flap_ranks_by_what_fluctuates_and_not_by_what_is_constant():
    """A channel that adds the same on every token ranks last, however large it is: the bias can replace it."""
    model = tiny_model()
    layer, (queries, channels) = model.model.layers[1], inputs_of(model, 1)
    scores = scored(model, "flap")[1]
    columns = (queries.var(0, correction=0) * layer.self_attn.o_proj.weight.square().sum(0)).square()
    standard = ((columns - columns.mean()) / columns.std(correction=0)).view(2, -1).mean(1)  # over two groups' columns
    torch.testing.assert_close(scores.kv_groups, standard.detach(), rtol=1e-3, atol=1e-4)
    naive = channels.var(0, correction=0) * layer.mlp.down_proj.weight.square().sum(0)
    naive = (naive - naive.mean()) / naive.std(correction=0)
    torch.testing.assert_close(scores.channels, naive.detach(), rtol=1e-3, atol=1e-4)
    assert abs(scores.channels.mean()) < 1e-4 and scores.channels.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_obs_prefers_the_unit_that_the_others_can_replace():
    """Channel 3 is made a copy of channel 5: one of the two goes first, whatever its weights."""
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[3] = linear.weight[5]
        mlp.down_proj.weight[:, 3] *= 3
        mlp.down_proj.weight[:, 5] *= 3
    assert scored(model, "wanda", windows=random_windows(40, 16))[1].channels.argsort()[0] not in (3, 5)
    assert scored(model, "obs", windows=random_windows(40, 16))[1].channels.argsort()[0] in (3, 5)


def test_a_model_with_a_broken_weight_is_refused_with_a_sentence():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match="not finite: run diagnose_model.py"):
        scored(model, "taylor")
