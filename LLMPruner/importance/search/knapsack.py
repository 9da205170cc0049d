"""The levels of all sublayers that meet a budget of parameters with the least sum of costs, by dynamic programming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from LLMPruner.importance.budget import Budget, Prunable, round_levels

CELLS = 16384  # the finest resolution of the budget


def costs_between(known: Mapping[int, float], count: int) -> list[float]:
    """The cost of each of `count` levels: as measured where it is known, straight lines between, the same beyond.

    What removes more counts as no better: a cost below that of a smaller cut is the noise of few tokens.
    """
    import numpy

    points = sorted(known)
    costs = list(itertools.accumulate((known[point] for point in points), max))
    return numpy.interp(range(count), points, costs).tolist()


def cheapest_levels(costs: Sequence[Sequence[float]], budget: Budget, limits: Sequence[tuple[int, int]]) -> list[int]:
    """Levels within `limits` that remove the budget's target, or up to one step more, with the least sum of costs."""
    levels = knapsack(costs, budget.sublayers, limits, budget.target)
    wanted = [float(sublayer.removed(level)) for sublayer, level in zip(budget.sublayers, levels, strict=True)]
    return round_levels(budget.target, budget.sublayers, limits, wanted)


def knapsack(
    costs: Sequence[Sequence[float]], sublayers: Sequence[Prunable], limits: Sequence[tuple[int, int]], target: int
) -> list[int]:
    """Levels with the least sum of costs that remove `target` parameters or more."""
    import numpy

    # In cells that divide all steps nothing is lost by rounding: else plans that just meet the target would seem to miss it.
    cell = math.gcd(*(sublayer.removed(level) for sublayer in sublayers for level in range(len(sublayer.levels))))
    cell = max(cell, target // CELLS, 1)
    goal = -(-target // cell)
    best = numpy.full(goal + 1, numpy.inf)  # best[p]: least cost of removing p cells or more
    best[0] = 0.0
    choices = []
    for cost, sublayer, (low, high) in zip(costs, sublayers, limits, strict=True):
        steps = [sublayer.removed(level) // cell for level in range(low, high + 1)]  # never less is removed than counted
        reach = numpy.stack([best[numpy.maximum(numpy.arange(goal + 1) - step, 0)] for step in steps])
        total = reach + numpy.array(cost[low : high + 1])[:, None]  # (levels, cells)
        choices.append((total.argmin(0), steps))
        best = total.min(0)
    levels, place = [], goal
    for (choice, steps), (low, _) in zip(reversed(choices), reversed(limits), strict=True):
        levels.append(low + int(choice[place]))
        place = max(place - steps[choice[place]], 0)
    return levels[::-1]
