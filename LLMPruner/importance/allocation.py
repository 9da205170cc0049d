"""How much per layer: layer scores and the budget become integer counts, and with unit scores the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from LLMPruner.config import PruneConfig
from LLMPruner.importance.budget import Budget, Prunable, level_limits, round_levels
from LLMPruner.importance.criteria import CRITERIA, UnitScores
from LLMPruner.methods.gqa_aware import select_units
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan


def inverse(score: float, size: int) -> float:
    """Important layers lose less, and within a layer the larger sublayer loses more: size over the root of the score.

    A layer's score counts for its attention and its MLP alike, so per parameter the smaller one matters more. Measured on
    SmolLM2-135M, 25% removed, WikiText-2 validation (dense 22.2): 1/score 43.7, 1/sqrt(score) 42.0, this 37.6.
    """
    return size / math.sqrt(score)


def proportional(score: float, size: int) -> float:
    """Important layers lose more: the opposite of `inverse`, the control that shows layer importance matters."""
    return score


def uniform(score: float, size: int) -> float:
    """Every sublayer loses the same share."""
    return 1.0


# The weight of a sublayer's pruning rate, from its layer's score (above 0) and its own parameters.
WEIGHTS: dict[str, Callable[[float, int], float]] = {
    "inverse": inverse,
    "proportional": proportional,
    "uniform": uniform,
}
# `global` ranks the units of all sublayers together, `search` measures (importance/search.py): neither reads layer scores.
STRATEGIES = (*WEIGHTS, "global", "search")


def reads_layer_scores(config: PruneConfig) -> bool:
    """Whether the request needs the layer analysis: strategies that weigh layers, and freezing, do."""
    return config.pruning_strategy in WEIGHTS or config.freeze_top_n_layers > 0


def allocate(
    budget: Budget, scores: Sequence[float] | None, config: PruneConfig, units: Sequence[UnitScores] | None = None
) -> dict[tuple[int, str], int]:
    """Kept units of every selected sublayer, by `(layer, kind)`.

    By layer `scores`: a sublayer's rate is the strategy's weight to the power of --layer_importance_weight, scaled to meet
    the budget and clamped to the rate limits, which `make_budget` found to leave enough to remove. Under `global` the
    `units`' own scores decide.
    """
    limits = level_limits(budget, config, scores)
    if config.pruning_strategy == "global":
        wanted = _rank_units(budget, limits, units, CRITERIA[config.importance].scale)
    else:
        wanted = _fill(budget.target, budget.sublayers, limits, _weights(budget, scores, config))
    return budget.kept(round_levels(budget.target, budget.sublayers, limits, wanted))


def _weights(budget: Budget, scores: Sequence[float], config: PruneConfig) -> list[float]:
    layers = sorted({sublayer.layer for sublayer in budget.sublayers})
    positive = dict(zip(layers, _positive([scores[layer] for layer in layers]), strict=True))
    strategy = WEIGHTS[config.pruning_strategy]
    weights = [strategy(positive[sublayer.layer], sublayer.size) for sublayer in budget.sublayers]
    heaviest = max(weights)  # only ratios of weights count, and a power of these cannot overflow
    return [(weight / heaviest) ** config.layer_importance_weight for weight in weights]


def _rank_units(budget: Budget, limits: Sequence[tuple[int, int]], units: Sequence[UnitScores], scale: str) -> list[float]:
    """Parameters to remove from each sublayer when all units are ranked together and the lowest go (FLAP, An et al. 2024).

    Scores on the `scale` of the loss compare per parameter; those on a scale of their own are standardized first.
    """
    removed, candidates = [], []
    for which, (sublayer, (low, high)) in enumerate(zip(budget.sublayers, limits, strict=True)):
        values = sorted(units[sublayer.layer].of(sublayer.kind).tolist())
        if scale == "loss":
            values = [value / sublayer.unit_params for value in values]
        elif scale == "own":
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) or 1.0
            values = [(value - mean) / spread for value in values]
        first, last = (sublayer.removed(level) // sublayer.unit_params for level in (low, high))
        removed.append(float(sublayer.removed(low)))
        candidates += [(value, which) for value in values[first:last]]
    total = sum(removed)
    for _, which in sorted(candidates):
        if total >= budget.target:
            break
        removed[which] += budget.sublayers[which].unit_params
        total += budget.sublayers[which].unit_params
    return removed


def keep_best_units(
    geometry: Geometry, kept: dict[tuple[int, str], int], scores: Sequence[UnitScores], *, output_bias: bool = False
) -> PruningPlan:
    """The plan that keeps the best-scored units: `kept` counts by `(layer, kind)`; other sublayers stay whole."""
    layers = []
    for index, layer in enumerate(scores):
        groups = kept.get((index, "attention"), geometry.num_kv_heads)
        channels = kept.get((index, "mlp"), geometry.intermediate_size)
        layers.append(
            LayerPlan(select_units(layer.kv_groups.tolist(), groups), select_units(layer.channels.tolist(), channels))
        )
    return PruningPlan(geometry, tuple(layers), output_bias)


def _positive(scores: Sequence[float]) -> list[float]:
    """Scores lifted to be positive: a layer whose removal does not hurt counts like the least important other one."""
    floor = min((score for score in scores if score > 0), default=1.0)
    return [max(score, floor) for score in scores]


def _fill(target: int, active: Sequence[Prunable], limits: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float]:
    """Parameters to remove from each sublayer, summing to the target: rate = scale * weight, clamped; scale by bisection."""
    sizes = [sublayer.size for sublayer in active]
    low = [sublayer.removed(first) for sublayer, (first, _) in zip(active, limits, strict=True)]
    high = [sublayer.removed(last) for sublayer, (_, last) in zip(active, limits, strict=True)]
    mean = sum(weights) / len(weights)

    def removed(scale: float) -> list[float]:
        return [
            min(max(scale * weight / mean * size, least), most)
            for size, weight, least, most in zip(sizes, weights, low, high, strict=True)
        ]

    below, above = 0.0, 1.0
    while sum(removed(above)) < target and above < 1e18:
        above *= 2
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(removed(middle)) < target else (below, middle)
    return removed(above)
