"""Budget to plan: whatever the geometry and the request, the integers meet the target and respect every limit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from LLMPruner.config import PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.importance.allocation import STRATEGIES, allocate, build_plan, default_round_to, make_budget
from LLMPruner.importance.criteria import UnitScores
from LLMPruner.plan import Geometry, PruningPlan

LLAMA_3_8B = Geometry(128256, 4096, 14336, 32, 32, 8, 128)
SMOLLM2 = Geometry(49152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True)
TINY = Geometry(300, 64, 96, 4, 8, 2, 8)


@st.composite
def geometries(draw) -> Geometry:
    kv_heads = draw(st.integers(1, 8))
    return Geometry(
        vocab_size=draw(st.integers(1, 500)),
        hidden_size=draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(2, 200)),
        num_layers=draw(st.integers(1, 8)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 16)),
        tied_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def requests(draw, **fixed) -> tuple[Geometry, PruneConfig, list[float]]:
    """A geometry, a pruning request for it (feasible or not), and layer scores."""
    geometry = draw(geometries())
    attention = draw(st.booleans())
    mlp = True if not attention else draw(st.booleans())
    start = draw(st.integers(0, geometry.num_layers - 1))
    low, high = sorted((draw(st.just(0.0) | st.floats(0, 0.5)), draw(st.just(1.0) | st.floats(0.01, 1))))
    settings = {
        "pruning_ratio": draw(st.floats(0.001, 0.95)),
        "prune_attention": attention,
        "prune_mlp": mlp,
        "ratio_base": draw(st.sampled_from(["auto", "model", "selected"])),
        "round_to": draw(st.none() | st.integers(1, 64)),
        "layer_start": start,
        "layer_end": draw(st.none() | st.integers(start + 1, geometry.num_layers)),
        "pruning_strategy": draw(st.sampled_from(sorted(set(STRATEGIES) - {"search"}))),
        "layer_importance_weight": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 500.0])),
        "min_pruning_rate": low,
        "max_pruning_rate": high,
        "freeze_top_n_layers": draw(st.integers(0, 2)),
    }
    scores = draw(
        st.lists(
            st.floats(1e-9, 1e3) | st.sampled_from([-1.0, 0.0, 1.0]),
            min_size=geometry.num_layers,
            max_size=geometry.num_layers,
        )
    )
    return geometry, PruneConfig(**settings | fixed), scores


def planned(geometry: Geometry, config: PruneConfig, scores: list[float]) -> tuple[PruningPlan, int]:
    """The plan of a request and its target, the units scored at random."""
    budget = make_budget(geometry, config)
    generator = torch.Generator().manual_seed(0)
    units = [
        UnitScores(
            torch.rand(geometry.num_kv_heads, generator=generator), torch.rand(geometry.intermediate_size, generator=generator)
        )
        for _ in range(geometry.num_layers)
    ]
    return build_plan(geometry, allocate(budget, scores, config, units), units), budget.target


def named_ratio(error: UsageError) -> float:
    found = re.search(r"largest feasible ratio here is ([\d.e-]+)", str(error))
    assume(found is not None)
    return float(found.group(1))


def feasible(geometry: Geometry, config: PruneConfig, scores: list[float]) -> tuple[PruningPlan, int]:
    """The plan of the request, or of the ratio that its refusal names."""
    for _ in range(3):
        try:
            return planned(geometry, config, scores)
        except UsageError as error:
            config = replace(config, pruning_ratio=named_ratio(error))
    raise AssertionError("a named ratio is refused again and again")


def step_of(geometry: Geometry, config: PruneConfig) -> int:
    return config.round_to or default_round_to(geometry)


def one_step(geometry: Geometry, config: PruneConfig) -> int:
    """Parameters of one rounding step of one layer; one KV group when only attention is pruned."""
    return step_of(geometry, config) * geometry.channel_params if config.prune_mlp else geometry.group_params


@settings(deadline=None, max_examples=150)
@given(requests())
def test_the_target_is_met_and_exceeded_by_less_than_the_largest_step(request):
    geometry, config, scores = request
    plan, target = feasible(*request)
    most = max(one_step(geometry, config), geometry.group_params if config.prune_attention else 0)
    assert 0 <= plan.removed_params - target < most


@settings(deadline=None, max_examples=150)
@given(requests(min_pruning_rate=0.0, max_pruning_rate=1.0, freeze_top_n_layers=0))
def test_without_limits_the_excess_is_less_than_one_rounding_step_of_one_layer(request):
    geometry, config, scores = request
    fine = (geometry.intermediate_size - step_of(geometry, config)) * geometry.channel_params
    assume(not config.prune_mlp or not config.prune_attention or fine >= geometry.group_params)  # channels can fill the gaps
    assume(config.pruning_strategy != "global")  # it may take groups alone, and then no channel can be given back
    plan, target = feasible(*request)
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
        assert (plan.kv_counts[index], plan.channel_counts[index]) == plan.dense_counts


@settings(deadline=None, max_examples=200)
@given(requests(min_pruning_rate=0.0))
def test_an_infeasible_ratio_names_one_that_is_feasible(request):
    geometry, config, scores = request
    try:
        planned(*request)
    except UsageError as error:
        named = named_ratio(error)
        assert named < config.pruning_ratio and "--pruning_ratio" in str(error)
        plan, target = planned(geometry, replace(config, pruning_ratio=named), scores)
        assert plan.removed_params >= target
        with pytest.raises(UsageError):  # the next one is not: the named ratio is the largest to four digits
            planned(geometry, replace(config, pruning_ratio=named + 2e-4), scores)


@pytest.mark.parametrize(
    ("geometry", "settings", "complaint"),
    [
        (TINY, {"pruning_ratio": 0.9}, "--pruning_ratio 0.9 cannot be reached.* 0.5 .of the selected's"),
        (TINY, {"max_pruning_rate": 0.4}, "--max_pruning_rate"),
        (TINY, {"prune_mlp": True, "round_to": 96}, "--round_to 96 must be below the MLP width, 96"),
        (TINY, {"freeze_top_n_layers": 4}, "--freeze_top_n_layers 4 freezes all 4 selected layers"),
        (TINY, {"freeze_top_n_layers": 3, "pruning_ratio": 0.2}, "--freeze_top_n_layers limit"),
        (TINY, {"min_pruning_rate": 0.5, "pruning_ratio": 0.1}, "--min_pruning_rate 0.5 alone removes more"),
        (TINY, {"layer_start": 4}, "--layer_start 4"),
        (TINY, {"layer_end": 5}, "--layer_end 5"),
        (replace(TINY, num_kv_heads=1), {}, "there is nothing to remove here"),
    ],
)
def test_an_impossible_request_is_refused_by_its_flag(geometry, settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        planned(geometry, PruneConfig(**settings), [1.0, 2.0, 3.0, 4.0])


def tolerance(geometry: Geometry, config: PruneConfig) -> dict[str, int]:
    """Units by which rounding may tell layers of equal wish apart: one step, and the odd first one of an uneven width."""
    step = step_of(geometry, config)
    return {"attention": 1, "mlp": step + geometry.intermediate_size % step}


def removed_counts(plan: PruningPlan) -> dict[str, list[int]]:
    groups, width = plan.dense_counts
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


def test_the_base_is_the_model_only_when_all_of_it_is_pruned():
    def base(**settings):
        budget = make_budget(TINY, PruneConfig(0.1, **settings))
        return budget.base_name, budget.base

    attention, mlp = TINY.attention_params, TINY.mlp_params
    assert base(prune_mlp=True) == ("model", TINY.dense_params)
    assert base() == ("selected", 4 * attention)
    assert base(prune_attention=False, prune_mlp=True) == ("selected", 4 * mlp)
    assert base(prune_mlp=True, layer_start=1) == ("selected", 3 * (attention + mlp))
    assert base(prune_mlp=True, ratio_base="selected") == ("selected", 4 * (attention + mlp))
    assert base(ratio_base="model") == ("model", TINY.dense_params)


def test_the_ratio_is_read_as_typed_not_as_its_binary_neighbour():
    geometry = replace(TINY, vocab_size=1, hidden_size=1, intermediate_size=25, num_heads=1, num_kv_heads=1, head_dim=1)
    budget = make_budget(geometry, PruneConfig(0.07, prune_attention=False, prune_mlp=True, round_to=1))
    assert (budget.base, budget.target) == (300, 21), "in floats 0.07 * 300 is a little more than 21: ceil would give 22"


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.4, 0.6, 0.7])
def test_a_rate_limit_that_is_a_whole_number_of_units_is_reached_exactly(rate):
    geometry = replace(TINY, intermediate_size=10)
    config = PruneConfig(rate, prune_attention=False, prune_mlp=True, round_to=1, min_pruning_rate=rate, max_pruning_rate=rate)
    assert set(planned(geometry, config, [1.0, 2.0, 3.0, 4.0])[0].channel_counts) == {10 - round(rate * 10)}


@pytest.mark.parametrize(("width", "step"), [(14336, 256), (11008, 256), (1536, 64), (96, 4), (10, 1), (1, 1)])
def test_the_default_rounding_is_a_power_of_two_that_fits_the_width(width, step):
    assert default_round_to(replace(TINY, intermediate_size=width)) == step


@pytest.mark.parametrize("strategy", ["inverse", "proportional"])
def test_a_layer_whose_removal_helps_counts_like_the_least_important_other_one(strategy):
    config = PruneConfig(0.2, prune_mlp=True, round_to=1, pruning_strategy=strategy)
    helped, equal = (planned(TINY, config, scores)[0] for scores in ([-5.0, 1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 3.0]))
    assert helped == equal
