"""How much per layer, by measurement: the levels of all sublayers that give the least KL from the dense model.

First every sublayer of the dense model is shrunk alone to a few of its levels, healed, and the KL from the dense model
measured; dynamic programming over parameters turns these costs into a start (ZipLM, Kurtic et al. 2023). But what a sublayer
costs in the dense model is not what it costs in a pruned one. So plans evolve: a generation shifts every sublayer of the best
plan alone, either way, and dynamic programming over what that costs there gives its offspring (EvoPress, Sieberling et al.
2024, and Tyr, Li et al. 2025, shift at random, which takes many more trials). Where there are several, they look at one half of
the windows and then at the other: what suits a few windows alone does not last.
KL and not perplexity is the fitness: perplexity would overfit its corpus. So does KL on one narrow corpus, which is why a part
of the windows is the dense model's own text.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from tqdm import tqdm

from LLMPruner.config import PruneConfig
from LLMPruner.cost import Cost, Setup, Work
from LLMPruner.errors import RunError
from LLMPruner.importance.budget import Budget
from LLMPruner.importance.criteria import CRITERIA, gather_statistics, score_layer
from LLMPruner.importance.search.database import Database
from LLMPruner.importance.search.knapsack import cheapest_levels, costs_between
from LLMPruner.importance.search.state import SearchState
from LLMPruner.methods.repair import REPAIRS

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.forward import LayerRunner

logger = logging.getLogger("LLMPruner")

# Into how many even steps a sublayer's levels are parted, round by round; the cost is measured there, straight lines between.
# Coarse is enough for a start: what its sublayers cost is measured anew in every generation.
COST_ROUNDS = (1, 2)
SHIFT = 1 / 6  # by this part of the levels that a sublayer may take a generation shifts it
# As far as an offspring may go of these shifts, in whole levels: sublayers shifted together cost more than each alone.
WIDTHS = (1 / 3, 2 / 3, 1.0)
KNOWN = 1 << 29  # bytes that the dense model's answers may take; more are computed anew for every measure
STRIDE = 4  # every so many positions of a window count: neighbours say much the same, and the head is what costs


class Fitness:
    """KL(dense || changed), nats a token, over held-out windows `(n, seq_len)`.

    Hidden states before every layer of an adopted plan are cached, so a changed plan runs from its first changed layer on.
    Most measures are content with a part of the windows: every part should be like all, which takes four or more.
    """

    def __init__(self, database: Database, windows: torch.Tensor) -> None:
        self.database, self.runner, self.windows = database, database.runner, windows
        self.some = slice(0, -(-len(windows) // 4))  # windows for the costs
        half = len(windows) // 2
        self.halves = (slice(0, half), slice(half, None)) if half else (slice(None),)
        self.levels = [0] * len(database.sublayers)
        self._hidden = self.runner.prefixes(windows)
        self._dense, self._distance = self._hidden[-1][:, ::STRIDE], self.runner.head.divergence
        if known_bytes(self._dense.shape[:-1].numel(), database.geometry.vocab_size):
            self._dense, self._distance = self.runner.head.log_probs(self._dense), self.runner.head.divergence_from

    def adopt(self, levels: Sequence[int]) -> float:
        """Cache the prefixes of `levels`; returns its KL."""
        self.levels = list(levels)
        with self.database.replaced(levels):
            self._hidden = self.runner.prefixes(self.windows)
        return self._divergence(self._hidden[-1])

    def measure(self, levels: Sequence[int], part: slice = slice(None)) -> float:
        """The KL of `levels` on `part` of the windows."""
        pairs = zip(self.database.sublayers, levels, self.levels, strict=True)
        start = min((sublayer.layer for sublayer, new, old in pairs if new != old), default=self.runner.num_layers)
        with self.database.replaced(levels, start):
            last = self.runner.layers(self._hidden[start][part], start)
        return self._divergence(last, part)

    def alone(self, which: int, level: int, part: slice) -> float:
        """The KL of the adopted plan with sublayer `which` alone at `level`. Raises RunError where it is not finite."""
        levels = [*self.levels[:which], level, *self.levels[which + 1 :]]
        kl, sublayer = self.measure(levels, part), self.database.sublayers[which]
        if not math.isfinite(kl):
            raise RunError(f"the KL without a part of layer {sublayer.layer}'s {sublayer.kind} is {kl}: try --dtype float32")
        kept = sublayer.levels[level]
        logger.info("search: layer %2d %s, %d kept: KL %.5f", sublayer.layer, sublayer.kind, kept, kl)
        return kl

    def half(self, generation: int) -> slice:
        """The windows that a generation's shifts are measured on."""
        return self.halves[generation % len(self.halves)]

    def _divergence(self, last: torch.Tensor, part: slice = slice(None)) -> float:
        return self._distance(last[:, ::STRIDE], self._dense[part])


def known_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes of the dense model's log-probabilities for so many tokens; 0 where they are too many to be kept."""
    needed = 4 * tokens * vocabulary
    return needed if needed <= KNOWN else 0


def prepare(
    runner: LayerRunner,
    budget: Budget,
    config: PruneConfig,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    *,
    seed: int,
) -> Fitness:
    """What a search measures with: `calibration` `(n, seq_len)` feeds statistics and healing, `held_out` the KL."""
    repair = REPAIRS[config.repair]  # one that does not solve for weights changes little: unhealed levels stand for it
    database = Database(runner, budget.geometry, budget.sublayers, heals=repair is not None and repair.solves)
    fill_database(database, config, calibration, seed)
    return Fitness(database, held_out)


def find_levels(
    fitness: Fitness,
    budget: Budget,
    config: PruneConfig,
    *,
    limits: Sequence[tuple[int, int]],
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> None:
    """Bring `state.levels`, one of each sublayer, to the best plan that is found.

    `limits` are the first and last level of each sublayer; `state` is where to begin, and `save` gets it after every step.
    Past `deadline` (of `time.monotonic`) the best plan so far wins; there is none before every sublayer was measured once.
    """
    measure_costs(fitness, limits, state, save, deadline)
    improve(fitness, budget, config, limits, state, save, deadline)


def improve(
    fitness: Fitness,
    budget: Budget,
    config: PruneConfig,
    limits: Sequence[tuple[int, int]],
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> None:
    """Find `state.levels` for the budget: dynamic programming over the measured costs, then generations until `deadline`.

    A plan of `state` beyond `limits`, which other layer scores may have moved since, does not count.
    """
    if state.levels and any(not low <= level <= high for level, (low, high) in zip(state.levels, limits, strict=True)):
        state.generation, state.stale, state.shifts = 0, 0, []
    if state.generation == 0 and not state.shifts:
        costs = [costs_between({0: 0.0} | known, len(s.levels)) for known, s in zip(state.costs, budget.sublayers, strict=True)]
        state.levels = cheapest_levels(costs, budget, limits)
    state.fitness = fitness.adopt(state.levels)
    if not math.isfinite(state.fitness):
        raise RunError(f"the KL of the pruned model is {state.fitness}: try --dtype float32, or a lower --pruning_ratio")
    logger.info("search: generation %d, KL %.4f", state.generation, state.fitness)
    save(state)
    while state.generation < config.search_generations and state.stale < len(fitness.halves):  # then nothing new would come
        if fitness.levels != state.levels:
            fitness.adopt(state.levels)
        if not measure_shifts(fitness, limits, state, save, deadline):
            logger.warning("search: %g minutes are over after generation %d", config.search_seconds / 60, state.generation)
            break
        _evolve(fitness, budget, state)
        save(state)


def fill_database(database: Database, config: PruneConfig, calibration: torch.Tensor, seed: int) -> None:
    """Scores and Gram matrices of all layers, in one pass over the calibration windows."""
    criterion, runner, geometry = CRITERIA[config.importance], database.runner, database.geometry
    names = [sublayer.name for sublayer in geometry.table.sublayers]
    for index, statistics in enumerate(gather_statistics(runner, geometry, calibration, {criterion.needs, "gram"})):
        scores = score_layer(criterion, runner, index, statistics, seed + 2 * index)
        grams = {name: gathered.moments.gram for name, gathered in zip(names, statistics, strict=True)}
        database.add_layer(scores, grams)


def measure_costs(
    fitness: Fitness,
    limits: Sequence[tuple[int, int]],
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> None:
    """Fill `state.costs`, coarse levels of all sublayers before finer ones: past `deadline` the finer ones stay unknown."""
    state.costs = state.costs or [{} for _ in limits]
    rounds = [[measured_levels(first, last, steps) for first, last in limits] for steps in COST_ROUNDS]
    total = sum(map(len, rounds[-1]))  # finer rounds measure the coarser ones' levels too
    with tqdm(total=total, initial=sum(map(len, state.costs)), desc="costs", disable=None, leave=False) as progress:
        for count, levels in enumerate(rounds):
            for which in range(len(limits)):
                if count and time.monotonic() > deadline:
                    logger.warning("search: the time is over in round %d of %d of the costs", count + 1, len(rounds))
                    return
                for level in sorted(levels[which] - state.costs[which].keys()):
                    state.costs[which][level] = fitness.alone(which, level, fitness.some)
                    save(state)
                    progress.update()


def measured_levels(first: int, last: int, steps: int) -> set[int]:
    """The levels that part those from `first` to `last` into `steps` even steps; none where there is no choice."""
    if first == last:
        return set()
    return {first + round((last - first) * step / steps) for step in range(1, steps + 1)} - {0}


def measure_shifts(
    fitness: Fitness,
    limits: Sequence[tuple[int, int]],
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> bool:
    """Fill `state.shifts`: the KL of the best plan with each sublayer alone shifted either way, on this generation's windows.

    Returns False where `deadline` came first; a resumed search measures the rest.
    """
    state.shifts = state.shifts or [{} for _ in limits]
    part = fitness.half(state.generation)
    wanted = [(which, level) for which in range(len(limits)) for level in shifted(state.levels[which], limits[which])]
    for which, level in tqdm(wanted, desc=f"generation {state.generation + 1}", disable=None, leave=False):
        if time.monotonic() > deadline:
            return False
        if level not in state.shifts[which]:
            state.shifts[which][level] = fitness.alone(which, level, part)
            save(state)
    return True


def shifted(level: int, limits: tuple[int, int]) -> list[int]:
    """The levels that a generation tries instead of `level`: one that removes less, one that removes more."""
    low, high = limits
    step = max(1, int(SHIFT * (high - low)))
    return sorted({max(low, level - step), min(high, level + step)} - {level})


def _evolve(fitness: Fitness, budget: Budget, state: SearchState) -> None:
    """One generation: the best of the offspring takes the best plan's place where its KL on all windows is less.

    On all: the half that the offspring do not come from has had its turn, so that a step back there is no bad sign.
    """
    base = fitness.measure(state.levels, fitness.half(state.generation))
    offspring = {tuple(shifted_levels(state, base, budget, width)) for width in WIDTHS} - {tuple(state.levels)}
    kl, best = min(((fitness.measure(levels), levels) for levels in offspring), default=(math.inf, ()))
    state.generation += 1
    state.stale += 1
    state.shifts = []
    if kl < state.fitness:
        state.levels, state.fitness, state.stale = list(best), kl, 0
    logger.info("search: generation %d, KL %.4f", state.generation, state.fitness)


def shifted_levels(state: SearchState, base: float, budget: Budget, width: float) -> list[int]:
    """Levels that meet the budget with the least sum of costs, each at most `width` of its shifts away, rounded up.

    `base` is the KL of the plan that was shifted, on the same windows.
    """
    costs, limits = [], []
    for known, level, sublayer in zip(state.shifts, state.levels, budget.sublayers, strict=True):
        points = known | {level: base}
        costs.append(costs_between(points, len(sublayer.levels)))
        low, high = min(points), max(points)
        limits.append((level - math.ceil(width * (level - low)), level + math.ceil(width * (high - level))))
    return cheapest_levels(costs, budget, limits)


def cost(setup: Setup, config: PruneConfig, sublayers: int) -> Cost:
    """What a search costs by its number of measures: rough, for it ends early where nothing gets better.

    Two costs and, in each generation, two shifts a sublayer; a measure runs half of the layers on a part of the windows and
    heals the changed sublayer. Half of the windows the dense model writes.
    """
    layers, hidden, windows = setup.geometry.num_layers, setup.geometry.hidden_size, sum(config.search_windows)
    tokens, seq_len, columns = windows * config.search_seq_len, config.search_seq_len, setup.columns(pruned=False)
    calibrated = config.channel_importance_samples * config.calibration_seq_len
    work = setup.forward(calibrated, config.calibration_seq_len)
    work += Work(product=2 * layers * calibrated * sum(width**2 for width in columns))
    work += setup.forward(tokens, seq_len) * (2 + 4 * config.search_generations) + setup.head_work(tokens // STRIDE)
    measured = setup.forward(tokens // 2, seq_len) + setup.head_work(tokens // STRIDE)
    work += Work(*(value // 4 for value in astuple(measured * (2 * sublayers))))
    work += Work(*(value // 2 for value in astuple(measured * (2 * sublayers * config.search_generations))))
    healed = [
        Work(single=2 * hidden * k * (w + k), factor=k**3 // 3)
        for w, k in zip(columns, setup.columns(pruned=True), strict=True)
    ]
    work += sum(healed, start=Work()) * (sublayers * (1 + config.search_generations))
    device = 2 * layers * hidden * sum(setup.columns(pruned=True)) * setup.itemsize + 12 * max(columns) ** 2
    device += known_bytes(tokens // STRIDE, setup.geometry.vocab_size)
    host = 2 * layers * sum(width**2 for width in columns)
    kept = setup.hidden(tokens, 2 * (layers + 1))
    return Cost("search", work, device, kept, host, head=True, most=config.search_seconds)
