"""The knapsack: the cheapest levels there are, and costs between those that were measured."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.importance.budget import Prunable
from LLMPruner.importance.search.knapsack import cheapest_levels, costs_between, knapsack


@given(st.integers(0, 10**6))
def test_dynamic_programming_finds_the_cheapest_levels_there_are(seed):
    rng = random.Random(seed)
    sublayers = [Prunable(i, "mlp", tuple(range(rng.randint(2, 4), 0, -1)), rng.choice((3, 5))) for i in range(4)]
    costs = [sorted(rng.random() for _ in s.levels) for s in sublayers]
    limits = [(rng.randint(0, 1), len(s.levels) - 1) for s in sublayers]
    target = rng.randint(1, sum(s.removed(high) for s, (_, high) in zip(sublayers, limits, strict=True)))

    def total(levels):
        return sum(cost[level] for cost, level in zip(costs, levels, strict=True))

    def removed(levels):
        return sum(s.removed(level) for s, level in zip(sublayers, levels, strict=True))

    every = itertools.product(*(range(low, high + 1) for low, high in limits))
    best = min(total(levels) for levels in every if removed(levels) >= target)
    found = knapsack(costs, sublayers, limits, target)
    assert removed(found) >= target and total(found) == pytest.approx(best)
    assert all(low <= level <= high for level, (low, high) in zip(found, limits, strict=True))


def test_costs_are_straight_lines_between_the_known_and_never_fall_where_more_is_removed():
    assert costs_between({0: 0, 2: 0.4, 4: 0.2, 6: 1.0}, 8) == pytest.approx([0, 0.2, 0.4, 0.4, 0.4, 0.7, 1.0, 1.0])
    assert costs_between({2: 0.5, 4: 0.7}, 6) == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.7, 0.7])
    assert costs_between({0: 0.0}, 2) == [0, 0], "a frozen sublayer has no costs"


def test_a_budget_of_more_parameters_than_cells_is_still_met():
    """Steps are rounded down to cells then, so that what is removed seems less than it is."""
    sublayers = [Prunable(layer, "mlp", tuple(range(20, 0, -1)), 99_991 + layer) for layer in range(6)]
    costs = [[level**2 * (1 + layer) for level in range(20)] for layer in range(6)]
    limits, target = [(0, 19)] * 6, 35 * 99_993
    levels = knapsack(costs, sublayers, limits, target)
    assert target <= sum(s.removed(level) for s, level in zip(sublayers, levels, strict=True)) <= target + 99_996
    assert levels == sorted(levels, reverse=True), "what costs least is cut most"


@given(st.integers(0, 10**6))
def test_the_cheapest_levels_meet_the_budget_and_no_step_can_be_taken_back(seed):
    rng = random.Random(seed)
    sublayers = [Prunable(layer, "mlp", tuple(range(20, 0, -1)), rng.randint(10_000, 99_999)) for layer in range(6)]
    costs = [sorted(rng.random() for _ in range(20)) for _ in range(6)]
    limits = [tuple(sorted(rng.choices(range(20), k=2))) for _ in range(6)]
    lowest, most = (sum(s.removed(limit[end]) for s, limit in zip(sublayers, limits, strict=True)) for end in (0, 1))
    target = rng.randint(lowest, most)
    levels = cheapest_levels(costs, SimpleNamespace(sublayers=sublayers, target=target), limits)
    removed = sum(s.removed(level) for s, level in zip(sublayers, levels, strict=True))
    assert removed >= target
    for sublayer, level, (low, high) in zip(sublayers, levels, limits, strict=True):
        assert low <= level <= high and (level == low or removed - sublayer.unit_params < target)
