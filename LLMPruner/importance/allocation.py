"""How much per layer: layer scores and the budget become integer counts, and with unit scores the plan.

All arithmetic on the budget is in integers. The achieved count is at least the target, and above it by less than one
rounding step of one layer (one KV group when only attention is pruned); with a repair that adds biases, the target allows
for one in every sublayer, and those that stay whole get none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from LLMPruner.config import PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.importance.criteria import CRITERIA, UnitScores
from LLMPruner.methods.gqa_aware import select_units
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan


@dataclass(frozen=True)
class Sublayer:
    """The ways to shrink one sublayer: `levels[i]` units are kept after i steps, each unit costing `unit_params`."""

    layer: int
    kind: str  # attention or mlp
    levels: tuple[int, ...]  # descending, the dense count first
    unit_params: int

    @property
    def size(self) -> int:
        """Prunable parameters of the dense sublayer."""
        return self.levels[0] * self.unit_params

    def removed(self, level: int) -> int:
        """Parameters removed at `level`."""
        return (self.levels[0] - self.levels[level]) * self.unit_params


@dataclass(frozen=True)
class Budget:
    """The parameters to remove, and the sublayers they may come from."""

    geometry: Geometry
    base: int  # parameters the ratio refers to
    base_name: str  # model or selected
    target: int  # parameters to remove, at least
    sublayers: tuple[Sublayer, ...]
    round_to: int = 1  # channels are kept in multiples of this

    def kept(self, levels: Sequence[int]) -> dict[tuple[int, str], int]:
        """Kept units of every selected sublayer, by `(layer, kind)`, at the given levels."""
        return {(s.layer, s.kind): s.levels[level] for s, level in zip(self.sublayers, levels, strict=True)}

    @property
    def largest(self) -> int:
        """Parameters removed when every selected sublayer is at its last level."""
        return sum(sublayer.removed(len(sublayer.levels) - 1) for sublayer in self.sublayers)


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


def default_round_to(geometry: Geometry) -> int:
    """Channels are kept in multiples of this: the largest power of two up to 256 within 1/16 of the width, so 256 at 8B."""
    step = 256
    while step > 1 and step * 16 > geometry.intermediate_size:
        step //= 2
    return step


def make_budget(geometry: Geometry, config: PruneConfig) -> Budget:
    """The integer budget of a request. Raises UsageError naming the largest feasible ratio when none of its plans meets it."""
    layers = config.layer_range(geometry.num_layers)
    step = config.round_to or default_round_to(geometry)
    if config.prune_mlp and step >= geometry.intermediate_size:
        raise UsageError(f"--round_to {step} must be below the MLP width, {geometry.intermediate_size}")
    sublayers = []
    for index in layers:
        if config.prune_attention:
            kept = tuple(range(geometry.num_kv_heads, 0, -1))
            if config.allow_sublayer_removal and index > 0:
                kept += (0,)
            sublayers.append(Sublayer(index, "attention", kept, geometry.group_params))
        if config.prune_mlp:
            width = geometry.intermediate_size
            kept = (width, *range((width - 1) // step * step, 0, -step))
            if config.allow_sublayer_removal:
                kept += (0,)
            sublayers.append(Sublayer(index, "mlp", kept, geometry.channel_params))
    selected = sum(sublayer.size for sublayer in sublayers)
    sublayers = [sublayer for sublayer in sublayers if len(sublayer.levels) > 1]  # one KV group cannot be pruned
    whole = config.prune_attention and config.prune_mlp and len(layers) == geometry.num_layers
    name = ("model" if whole else "selected") if config.ratio_base == "auto" else config.ratio_base
    base = geometry.dense_params if name == "model" else selected
    target = math.ceil(Fraction(str(config.pruning_ratio)) * base)
    if adds_bias(config):  # what the repair adds must be removed elsewhere
        has_bias = {"attention": geometry.attention_bias, "mlp": geometry.mlp_bias}
        target += geometry.hidden_size * sum(not has_bias[sublayer.kind] for sublayer in sublayers)
    budget = Budget(geometry, base, name, target, tuple(sublayers), step)
    if config.freeze_top_n_layers >= len(layers):
        raise UsageError(f"--freeze_top_n_layers {config.freeze_top_n_layers} freezes all {len(layers)} selected layers")
    _check_feasible(budget, config, len(layers))
    return budget


def _check_feasible(budget: Budget, config: PruneConfig, layers: int) -> None:
    """Layers are alike (but for the first one's attention, which stays), so it hardly matters which ones freeze."""
    smallest, largest = (
        sum(sublayer.removed(_limits(sublayer, config)[end]) for sublayer in budget.sublayers)
        * (layers - config.freeze_top_n_layers)
        // layers
        for end in (0, 1)
    )
    if budget.target > largest:
        why = "every sublayer keeps at least one KV group or rounding step"
        if largest < budget.largest:
            why = "--max_pruning_rate and --freeze_top_n_layers limit what may go"
        ratio = math.floor(largest / budget.base * 1e4) / 1e4
        found = f"the largest feasible ratio here is {ratio}" if ratio else "there is nothing to remove here"
        raise UsageError(
            f"--pruning_ratio {config.pruning_ratio} cannot be reached: {why}, "
            f"so {found} (of the {budget.base_name}'s {budget.base:,} parameters)"
        )
    if smallest > budget.target:
        raise UsageError(f"--min_pruning_rate {config.min_pruning_rate} alone removes more than --pruning_ratio asks for")


def reads_layer_scores(config: PruneConfig) -> bool:
    """Whether the request needs the layer analysis: strategies that weigh layers, and freezing, do."""
    return config.pruning_strategy in WEIGHTS or config.freeze_top_n_layers > 0


def level_limits(budget: Budget, config: PruneConfig, scores: Sequence[float] | None) -> list[tuple[int, int]]:
    """The first and last level each sublayer may take: the rate limits, and level 0 alone in frozen layers."""
    layers = sorted({sublayer.layer for sublayer in budget.sublayers})
    frozen: set[int] = set()
    if config.freeze_top_n_layers:
        frozen = set(sorted(layers, key=lambda layer: (-scores[layer], layer))[: config.freeze_top_n_layers])
    return [(0, 0) if sublayer.layer in frozen else _limits(sublayer, config) for sublayer in budget.sublayers]


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


def adds_bias(config: PruneConfig) -> bool:
    """Whether the repair gives pruned sublayers an output bias."""
    repair = REPAIRS[config.repair]
    return repair is not None and repair.adds_bias


def build_plan(
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


def _limits(sublayer: Sublayer, config: PruneConfig) -> tuple[int, int]:
    """The first and last level within the rate limits."""
    dense = sublayer.levels[0]
    rates = [(dense - kept) / dense for kept in sublayer.levels]  # exact where the rate is: 1 - 7/10 is above 0.3
    low = next((level for level, rate in enumerate(rates) if rate >= config.min_pruning_rate), len(rates) - 1)
    high = max(level for level, rate in enumerate(rates) if rate <= config.max_pruning_rate)
    return min(low, high), high


def _fill(target: int, active: Sequence[Sublayer], limits: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[float]:
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


def round_levels(
    target: int, active: Sequence[Sublayer], limits: Sequence[tuple[int, int]], wanted: Sequence[float]
) -> list[int]:
    """Whole levels near `wanted`, removing the target or up to one step more.

    Sublayers with coarse steps (KV groups) are rounded to the nearest level first; the finest ones then absorb what is
    left, step by step where the shortfall is largest.
    """
    finest = min(_step(sublayer) for sublayer in active)
    levels = [_nearest(sublayer, limit, want) for sublayer, limit, want in zip(active, limits, wanted, strict=True)]
    total = sum(sublayer.removed(level) for sublayer, level in zip(active, levels, strict=True))

    def candidates(direction: int, fine: bool) -> list[int]:
        return [
            i
            for i, sublayer in enumerate(active)
            if (_step(sublayer) == finest) == fine and limits[i][0] <= levels[i] + direction <= limits[i][1]
        ]

    def shortfall(i: int) -> float:
        return (wanted[i] - active[i].removed(levels[i])) / _step(active[i])

    while total < target:
        chosen = max(candidates(+1, True) or candidates(+1, False), key=lambda i: (shortfall(i), -i))
        levels[chosen] += 1
        total += _undo(active[chosen], levels[chosen])
    while True:
        back = [i for i in candidates(-1, True) + candidates(-1, False) if total - _undo(active[i], levels[i]) >= target]
        if not back:
            return levels
        chosen = min(back, key=lambda i: (shortfall(i), i))
        total -= _undo(active[chosen], levels[chosen])
        levels[chosen] -= 1


def _step(sublayer: Sublayer) -> int:
    """Parameters of a full step."""
    return _undo(sublayer, len(sublayer.levels) - 1)


def _undo(sublayer: Sublayer, level: int) -> int:
    """Parameters that come back when `level` is taken back by one step."""
    return sublayer.removed(level) - sublayer.removed(level - 1)


def _nearest(sublayer: Sublayer, limits: tuple[int, int], wanted: float) -> int:
    return min(range(limits[0], limits[1] + 1), key=lambda level: (abs(sublayer.removed(level) - wanted), level))
