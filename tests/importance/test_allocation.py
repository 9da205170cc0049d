"""Budget to plan: whatever the geometry and the request, the integers meet the target and respect every limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from LLMPruner.config import PruneConfig
from LLMPruner.plan import Geometry, PruningPlan
from tests.importance.drawn import LLAMA_3_8B, SMOLLM2, TINY, feasible, one_step, planned, requests, step_of


@settings(deadline=None, max_examples=150)
@given(requests())
def test_the_target_is_met_and_exceeded_by_less_than_the_largest_step(request):
    geometry, config, scores = request
    plan, target = feasible(*request)
    most = max(one_step(geometry, config), geometry.unit_params("attention") if config.prune_attention else 0)
    assert 0 <= plan.removed_params - target < most


@settings(deadline=None, max_examples=150)
@given(requests(min_pruning_rate=0.0, max_pruning_rate=1.0, freeze_top_n_layers=0))
def test_without_limits_the_excess_is_less_than_one_rounding_step_of_one_layer(request):
    geometry, config, scores = request
    fine = (geometry.intermediate_size - step_of(geometry, config)) * geometry.unit_params("mlp")
    filled = fine >= geometry.unit_params("attention")  # channels can fill the gaps
    assume(not config.prune_mlp or not config.prune_attention or filled)
    assume(config.pruning_strategy != "global")  # it may take groups alone, and then no channel can be given back
    plan, target = feasible(*request)
    given = config.prune_mlp and min(plan.channel_counts) < geometry.intermediate_size
    assume(not config.prune_attention or not config.prune_mlp or given)  # where no channel went, none can be given back
    assert 0 <= plan.removed_params - target < one_step(geometry, config)


@settings(deadline=None, max_examples=150)
@given(requests())
def test_counts_respect_floor_rounding_rates_and_what_was_not_selected(request):
    geometry, config, scores = request
    plan, _ = feasible(*request)
    selected = config.layer_range(geometry.num_layers)
    step = step_of(geometry, config)
    for index, layer in enumerate(plan.layers):
        groups, width = len(layer.kv_groups), len(layer.channels)
        assert groups >= 1 and width >= min(step, geometry.intermediate_size)
        assert width == geometry.intermediate_size or width % step == 0
        assert groups == geometry.num_kv_heads or (config.prune_attention and index in selected)
        assert width == geometry.intermediate_size or (config.prune_mlp and index in selected)
        assert (geometry.num_kv_heads - groups) / geometry.num_kv_heads <= config.max_pruning_rate
        assert (geometry.intermediate_size - width) / geometry.intermediate_size <= config.max_pruning_rate


@settings(deadline=None, max_examples=100)
@given(requests(freeze_top_n_layers=0, min_pruning_rate=0.2, max_pruning_rate=1.0))
def test_every_selected_sublayer_loses_at_least_the_least_rate(request):
    geometry, config, scores = request
    plan, _ = feasible(*request)
    for index in config.layer_range(geometry.num_layers):
        if config.prune_attention:
            assert plan.kv_counts[index] <= max(1, 0.8 * geometry.num_kv_heads)
        if config.prune_mlp:
            assert plan.channel_counts[index] <= max(step_of(geometry, config), 0.8 * geometry.intermediate_size)


@settings(deadline=None, max_examples=100)
@given(requests(freeze_top_n_layers=2))
def test_the_most_important_layers_stay_whole(request):
    geometry, config, scores = request
    plan, _ = feasible(*request)
    selected = config.layer_range(geometry.num_layers)
    for index in sorted(selected, key=lambda layer: (-scores[layer], layer))[:2]:
        assert (plan.kv_counts[index], plan.channel_counts[index]) == (geometry.num_kv_heads, geometry.intermediate_size)


def tolerance(geometry: Geometry, config: PruneConfig) -> dict[str, int]:
    """Units by which rounding may tell layers of equal wish apart: one step, and the odd first one of an uneven width."""
    step = step_of(geometry, config)
    return {"attention": 1, "mlp": step + geometry.intermediate_size % step}


def removed_counts(plan: PruningPlan) -> dict[str, list[int]]:
    groups, width = plan.geometry.num_kv_heads, plan.geometry.intermediate_size
    return {"attention": [groups - kept for kept in plan.kv_counts], "mlp": [width - kept for kept in plan.channel_counts]}


@settings(deadline=None, max_examples=100)
@given(requests(min_pruning_rate=0.0, freeze_top_n_layers=0), st.sampled_from(["inverse", "proportional"]))
def test_inverse_spares_important_layers_and_proportional_the_others(request, strategy):
    geometry, config, scores = request
    plan, _ = feasible(geometry, replace(config, pruning_strategy=strategy), scores)
    sign = 1 if strategy == "inverse" else -1
    selected = sorted(config.layer_range(geometry.num_layers), key=lambda layer: sign * scores[layer])
    for kind, step in tolerance(geometry, config).items():
        counts = removed_counts(plan)[kind]
        for index, loses_more in enumerate(selected):
            for loses_less in selected[index + 1 :]:
                assert counts[loses_more] >= counts[loses_less] - step


@settings(deadline=None, max_examples=100)
@given(requests(freeze_top_n_layers=0, pruning_strategy="uniform"))
def test_uniform_removes_the_same_from_every_layer_up_to_rounding(request):
    geometry, config, scores = request
    plan, _ = feasible(*request)
    selected = config.layer_range(geometry.num_layers)
    for kind, step in tolerance(geometry, config).items():
        counts = [removed_counts(plan)[kind][index] for index in selected]
        assert max(counts) - min(counts) <= step


@settings(deadline=None, max_examples=100)
@given(requests(layer_importance_weight=0.0, freeze_top_n_layers=0, pruning_strategy="inverse"))
def test_weight_zero_is_uniform(request):
    geometry, config, scores = request
    plan, _ = feasible(*request)
    assert plan == feasible(geometry, replace(config, pruning_strategy="uniform"), scores)[0]


@pytest.mark.parametrize("strategy", ["inverse", "proportional"])
def test_a_larger_weight_spreads_the_rates_further(strategy):
    spreads = []
    for weight in (0.0, 0.5, 1.0):
        config = PruneConfig(0.2, prune_mlp=True, pruning_strategy=strategy, layer_importance_weight=weight)
        counts = planned(SMOLLM2, config, [1 + index / 10 for index in range(30)])[0].channel_counts
        spreads.append(max(counts) - min(counts))
    assert spreads[0] <= 64 and spreads[0] < spreads[1] < spreads[2]


@pytest.mark.parametrize(("geometry", "total"), [(LLAMA_3_8B, 8_030_261_248), (SMOLLM2, 134_515_008)])
def test_a_quarter_of_a_real_model_is_a_quarter(geometry, total):
    assert geometry.dense_params == total
    config = PruneConfig(0.25, prune_mlp=True)
    plan, target = planned(geometry, config, [1.0] * geometry.num_layers)
    assert target == -(-total // 4) and plan.removed_params / total == pytest.approx(0.25, abs=0.001)
    assert plan.removed_params >= target


@pytest.mark.parametrize("strategy", ["inverse", "proportional"])
def test_a_layer_whose_removal_helps_counts_like_the_least_important_other_one(strategy):
    config = PruneConfig(0.2, prune_mlp=True, round_to=1, pruning_strategy=strategy)
    helped, equal = (planned(TINY, config, scores)[0] for scores in ([-5.0, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 3.0]))
    assert helped == equal
