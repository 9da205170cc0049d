"""How much may go: the ratio becomes a number of parameters, and every sublayer the sizes it may take.

All arithmetic is in integers. The achieved count is at least the target, and above it by less than one rounding step of one
layer (one KV group when only attention is pruned); with a repair that adds biases, the target allows for one in every
sublayer, and those that stay whole get none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from LLMPruner.config import PruneConfig
from LLMPruner.errors import UsageError
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.plan import Geometry


@dataclass(frozen=True)
class Prunable:
    """A sublayer that may be pruned, and its sizes: at level i it keeps `levels[i]` units, each of `unit_params` parameters."""

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
    sublayers: tuple[Prunable, ...]
    round_to: int = 1  # channels are kept in multiples of this

    def kept(self, levels: Sequence[int]) -> dict[tuple[int, str], int]:
        """Kept units of every selected sublayer, by `(layer, kind)`, at the given levels."""
        return {(s.layer, s.kind): s.levels[level] for s, level in zip(self.sublayers, levels, strict=True)}

    @property
    def largest(self) -> int:
        """Parameters removed when every selected sublayer is at its last level."""
        return sum(sublayer.removed(len(sublayer.levels) - 1) for sublayer in self.sublayers)


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
    sublayers = [part for index in layers for part in _prunables(index, geometry, config, step)]
    selected = sum(sublayer.size for sublayer in sublayers)
    sublayers = [sublayer for sublayer in sublayers if len(sublayer.levels) > 1]  # one KV group cannot be pruned
    whole = config.prune_attention and config.prune_mlp and len(layers) == geometry.num_layers
    name = ("model" if whole else "selected") if config.ratio_base == "auto" else config.ratio_base
    base = geometry.dense_params if name == "model" else selected
    target = math.ceil(Fraction(str(config.pruning_ratio)) * base)
    if adds_bias(config):  # what the repair adds must be removed elsewhere
        outputs = (geometry.table.sublayer(sublayer.kind).output for sublayer in sublayers)
        target += geometry.hidden_size * sum(not geometry.has_bias(output) for output in outputs)
    budget = Budget(geometry, base, name, target, tuple(sublayers), step)
    if config.freeze_top_n_layers >= len(layers):
        raise UsageError(f"--freeze_top_n_layers {config.freeze_top_n_layers} freezes all {len(layers)} selected layers")
    _check_feasible(budget, config, len(layers))
    return budget


def _prunables(index: int, geometry: Geometry, config: PruneConfig, step: int) -> Iterator[Prunable]:
    """The selected sublayers of layer `index` with the sizes they may take."""
    if config.prune_attention:
        kept = tuple(range(geometry.num_kv_heads, 0, -1))
        if config.allow_sublayer_removal and index > 0:
            kept += (0,)
        yield Prunable(index, "attention", kept, geometry.unit_params("attention"))
    if config.prune_mlp:
        width = geometry.intermediate_size
        kept = (width, *range((width - 1) // step * step, 0, -step))
        if config.allow_sublayer_removal:
            kept += (0,)
        yield Prunable(index, "mlp", kept, geometry.unit_params("mlp"))


def _check_feasible(budget: Budget, config: PruneConfig, layers: int) -> None:
    """Which layers freeze is known only when they are scored: the budget must be met whichever they are."""
    left = max(0, layers - config.freeze_top_n_layers)
    least, most = defaultdict(int), defaultdict(int)
    for sublayer in budget.sublayers:
        for removed, end in ((least, 0), (most, 1)):
            removed[sublayer.layer] += sublayer.removed(_limits(sublayer, config)[end])
    smallest = sum(sorted(least.values(), reverse=True)[:left])
    largest = sum(sorted(most.values())[:left])
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


def level_limits(budget: Budget, config: PruneConfig, scores: Sequence[float] | None) -> list[tuple[int, int]]:
    """The first and last level each sublayer may take: the rate limits, and level 0 alone in frozen layers."""
    layers = sorted({sublayer.layer for sublayer in budget.sublayers})
    frozen: set[int] = set()
    if config.freeze_top_n_layers:
        frozen = set(sorted(layers, key=lambda layer: (-scores[layer], layer))[: config.freeze_top_n_layers])
    return [(0, 0) if sublayer.layer in frozen else _limits(sublayer, config) for sublayer in budget.sublayers]


def adds_bias(config: PruneConfig) -> bool:
    """Whether the repair gives pruned sublayers an output bias."""
    repair = REPAIRS[config.repair]
    return repair is not None and repair.adds_bias


def _limits(sublayer: Prunable, config: PruneConfig) -> tuple[int, int]:
    """The first and last level within the rate limits."""
    dense = sublayer.levels[0]
    rates = [(dense - kept) / dense for kept in sublayer.levels]  # exact where the rate is: 1 - 7/10 is above 0.3
    low = next((level for level, rate in enumerate(rates) if rate >= config.min_pruning_rate), len(rates) - 1)
    high = max(level for level, rate in enumerate(rates) if rate <= config.max_pruning_rate)
    return min(low, high), high


def round_levels(
    target: int, active: Sequence[Prunable], limits: Sequence[tuple[int, int]], wanted: Sequence[float]
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


def _step(sublayer: Prunable) -> int:
    """Parameters of a full step."""
    return _undo(sublayer, len(sublayer.levels) - 1)


def _undo(sublayer: Prunable, level: int) -> int:
    """Parameters that come back when `level` is taken back by one step."""
    return sublayer.removed(level) - sublayer.removed(level - 1)


def _nearest(sublayer: Prunable, limits: tuple[int, int], wanted: float) -> int:
    return min(range(limits[0], limits[1] + 1), key=lambda level: (abs(sublayer.removed(level) - wanted), level))
