"""The budget: the ratio as an exact count of parameters, what it refuses, and the sizes that sublayers may take."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from LLMPruner.config import PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.importance.budget import Prunable, default_round_to, level_limits, make_budget, round_levels
from tests.importance.drawn import TINY, named_ratio, planned, requests


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
        make_budget(geometry, PruneConfig(**settings))


def test_a_budget_holds_whichever_layers_freeze():
    """The first attention alone may not go whole: with it among the layers left, the least can be removed."""
    settings = {"prune_mlp": True, "freeze_top_n_layers": 1, "max_pruning_rate": 1.0, "round_to": 24}
    search = {"pruning_strategy": "search", "allow_sublayer_removal": True}
    with pytest.raises(UsageError, match="--freeze_top_n_layers limit what may go, so the largest feasible ratio") as refused:
        make_budget(TINY, PruneConfig(0.7, **settings, **search))
    named = float(re.search(r"ratio here is ([\d.]+)", str(refused.value))[1])
    config = PruneConfig(named, **settings, **search)
    budget = make_budget(TINY, config)
    for important in range(4):
        limits = level_limits(budget, config, [5.0 if layer == important else 1.0 for layer in range(4)])
        levels = round_levels(budget.target, budget.sublayers, limits, [0.0] * len(limits))
        assert sum(s.removed(level) for s, level in zip(budget.sublayers, levels, strict=True)) >= budget.target


def test_the_base_is_the_model_only_when_all_of_it_is_pruned():
    def base(**settings):
        budget = make_budget(TINY, PruneConfig(0.1, **settings))
        return budget.base_name, budget.base

    attention, mlp = (TINY.sublayer_params(name) for name in ("attention", "mlp"))
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


@pytest.mark.parametrize(("changes", "sublayers"), [({}, 8), ({"attention_bias": True}, 4), ({"mlp_bias": True}, 4)])
def test_biases_that_the_repair_adds_are_removed_elsewhere(changes, sublayers):
    """One for every sublayer that may be pruned and has none yet."""
    geometry = replace(TINY, **changes)
    without, with_biases = (make_budget(geometry, PruneConfig(0.2, prune_mlp=True, repair=name)) for name in ("none", "bias"))
    assert with_biases.target - without.target == sublayers * geometry.hidden_size and with_biases.base == without.base


def test_levels_are_all_sizes_in_steps_and_a_whole_sublayer_goes_only_where_allowed_and_never_the_first_attention():
    def levels(**settings):
        budget = make_budget(TINY, PruneConfig(0.2, prune_mlp=True, round_to=40, pruning_strategy="search", **settings))
        return {(sublayer.layer, sublayer.kind): sublayer.levels for sublayer in budget.sublayers}

    kept, removable = levels(), levels(allow_sublayer_removal=True)
    assert kept[0, "attention"] == kept[3, "attention"] == removable[0, "attention"] == (2, 1)
    assert kept[0, "mlp"] == (96, 80, 40), "multiples of the step, and the odd dense width"
    assert removable[1, "attention"] == (2, 1, 0) and removable[0, "mlp"] == (96, 80, 40, 0)


def test_frozen_layers_may_take_level_0_alone_and_the_others_what_the_rates_allow():
    config = PruneConfig(0.1, prune_mlp=True, round_to=24, freeze_top_n_layers=2, max_pruning_rate=0.5)
    budget = make_budget(TINY, config)
    limits = {
        (sublayer.layer, sublayer.kind): limit
        for sublayer, limit in zip(budget.sublayers, level_limits(budget, config, [3.0, 1.0, 3.0, 5.0]), strict=True)
    }
    for frozen in (0, 3):  # of equal scores the earlier layer
        assert limits[frozen, "attention"] == limits[frozen, "mlp"] == (0, 0)
    for free in (1, 2):
        assert limits[free, "attention"] == (0, 1) and limits[free, "mlp"] == (0, 2), "half of 96 in steps of 24"


@given(st.integers(0, 10**6))
def test_rounding_meets_the_target_within_the_limits_and_no_step_can_be_taken_back(seed):
    rng = random.Random(seed)
    active = [
        Prunable(i, "mlp", tuple(range(rng.randint(2, 9), 0, -1)), rng.choice((3, 7, 20))) for i in range(rng.randint(1, 6))
    ]
    limits = [tuple(sorted(rng.choices(range(len(sublayer.levels)), k=2))) for sublayer in active]
    lowest, most = (sum(s.removed(limit[end]) for s, limit in zip(active, limits, strict=True)) for end in (0, 1))
    target = rng.randint(lowest, most)
    levels = round_levels(target, active, limits, [rng.uniform(0, 1.2) * sublayer.size for sublayer in active])
    assert all(low <= level <= high for level, (low, high) in zip(levels, limits, strict=True))
    removed = sum(sublayer.removed(level) for sublayer, level in zip(active, levels, strict=True))
    assert removed >= target
    for sublayer, level, (low, _) in zip(active, levels, limits, strict=True):
        assert level == low or removed - sublayer.unit_params < target


def test_rounding_takes_the_wished_levels_where_they_just_meet_the_target():
    active = [Prunable(layer, "mlp", tuple(range(9, 0, -1)), 10) for layer in range(3)]
    assert round_levels(90, active, [(0, 8)] * 3, [10.0, 30.0, 50.0]) == [1, 3, 5]
    assert round_levels(90, active, [(0, 8), (0, 2), (0, 8)], [10.0, 30.0, 44.0]) == [2, 2, 5], "what is cut off goes elsewhere"


def test_what_is_kept_is_named_by_layer_and_sublayer():
    budget = make_budget(TINY, PruneConfig(0.2, prune_mlp=True, round_to=24, layer_start=2, layer_end=3))
    assert budget.kept([1, 2]) == {(2, "attention"): 1, (2, "mlp"): 48}
    assert budget.largest == TINY.unit_params("attention") + 72 * TINY.unit_params("mlp")
