"""How much per layer, by measurement: the levels of all sublayers that give the least KL from the dense model.

First every sublayer is shrunk alone to some of its levels, coarse ones before finer ones, healed, and the KL from the dense
model measured on half of the held-out windows; dynamic programming over parameters turns these costs into a start. Then
levels are shifted between sublayers and the KL of the whole pruned model on all of them decides: on fewer, the shifts fit
these few (ZipLM, Kurtic et al. 2023; EvoPress, Sieberling et al. 2024; Tyr, Li et al. 2025).
KL and not perplexity is the fitness: perplexity would overfit its corpus. So does KL on one narrow corpus, which is why a part
of the windows is the dense model's own text.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from LLMPruner.checkpoint import write_json
from LLMPruner.config import PruneConfig
from LLMPruner.errors import RunError, UsageError
from LLMPruner.importance.allocation import Budget, Sublayer, round_levels
from LLMPruner.importance.criteria import CRITERIA, UnitScores, gather_statistics, score_layer
from LLMPruner.importance.database import Database
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.methods.sublayers import KINDS
from LLMPruner.run import read_json_file

if TYPE_CHECKING:
    import torch

    from LLMPruner.forward import LayerRunner

logger = logging.getLogger("LLMPruner")

# Into how many even steps a sublayer's levels are parted, round by round; the cost is measured there and interpolated between.
# On SmolLM2 the last round corrects costs by 3 to 6%, and by 10% where nearly nothing is removed; it is what a search that is
# short of time does without.
COST_ROUNDS = (1, 2, 4, 8)
OFFSPRING = 8  # mutants a generation
SURVIVORS = 2  # of them measured on all windows; the others die on some of them
CELLS = 4096  # resolution of the budget in dynamic programming
STRIDE = 4  # every so many positions of a window count: neighbours say much the same, and the head is what costs
STALE = 15  # generations without an improvement that end the search
MEASURES = 4  # raised whenever a cost or the fitness comes to mean something else: saved ones are not comparable then


@dataclass
class SearchState:
    """What a search has found so far; saved after every step, so that an interrupted one continues."""

    costs: list[dict[int, float]] = field(default_factory=list)  # by sublayer: KL at the levels measured so far
    levels: list[int] | None = None  # the best so far
    fitness: float | None = None  # its KL, nats a token
    generation: int = 0
    stale: int = 0  # generations since the last improvement

    def save(self, path: Path, key: dict[str, Any]) -> None:
        """Write the state as JSON; `key` says which search it belongs to."""
        write_json(path, {"key": key, **asdict(self)})

    @classmethod
    def load(cls, path: Path, key: dict[str, Any]) -> SearchState:
        """Read it back. Raises UsageError when it is missing, malformed or of another search."""
        data = read_json_file(path, "--resume: the search state")
        if not isinstance(data, dict) or data.pop("key", None) != key:
            raise UsageError(f"--resume: {path} is of a search with other settings: repeat its command, or search anew")
        try:
            state = cls(**data)
            state.costs = [{int(level): cost for level, cost in known.items()} for known in state.costs]  # JSON's keys are text
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"--resume: {path} is not a search state: {error}") from error
        return state


class Fitness:
    """KL(dense || changed), nats a token, over held-out windows `(n, seq_len)`.

    Hidden states before every layer of an adopted plan are cached, so a changed plan runs from its first changed layer on.
    Some measures are content with the first windows: these should be like all.
    """

    def __init__(self, database: Database, windows: torch.Tensor) -> None:
        self.database, self.runner, self.windows = database, database.runner, windows
        self.some = max(1, len(windows) // 2)  # windows for costs, and for the first look at a mutant
        self.levels = [0] * len(database.budget.sublayers)
        self._hidden = self._prefixes()
        self._dense = self._hidden[-1]

    def adopt(self, levels: Sequence[int]) -> float:
        """Cache the prefixes of `levels`; returns its KL."""
        self.levels = list(levels)
        with self.database.replaced(levels):
            self._hidden = self._prefixes()
        return self._divergence(self._hidden[-1])

    def measure(self, levels: Sequence[int], count: int | None = None) -> float:
        """The KL of `levels`, on the first `count` windows (None: all)."""
        pairs = zip(self.database.budget.sublayers, levels, self.levels, strict=True)
        start = min((sublayer.layer for sublayer, new, old in pairs if new != old), default=self.runner.num_layers)
        with self.database.replaced(levels, start):
            last = self.runner.layers(self._hidden[start][:count], start)
        return self._divergence(last)

    def _divergence(self, last: torch.Tensor) -> float:
        return self.runner.divergence(last[:, ::STRIDE], self._dense[: len(last), ::STRIDE])

    def _prefixes(self) -> list[torch.Tensor]:
        hidden = [self.runner.embed(self.windows)]
        for index in range(self.runner.num_layers):
            hidden.append(self.runner.layer(index, hidden[-1]))
        return hidden


def search(
    runner: LayerRunner,
    budget: Budget,
    config: PruneConfig,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    *,
    limits: Sequence[tuple[int, int]],
    seed: int,
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> tuple[dict[tuple[int, str], int], list[UnitScores]]:
    """Kept units of every sublayer by `(layer, kind)`, and the scores by which they are chosen.

    `calibration` feeds statistics and healing, `held_out` the KL, its first half the costs. `limits` are the first and last
    level of each sublayer; `state` is where to begin, and `save` gets it after every step. Past `deadline` (of
    `time.monotonic`) the best plan so far wins; there is none before every sublayer was measured once.
    """
    database = Database(runner, budget, heals=REPAIRS[config.repair] is not None)
    fill_database(database, config, calibration, seed)
    fitness = Fitness(database, held_out)
    measure_costs(fitness, limits, state, save, deadline)
    improve(fitness, budget, config, limits, seed, state, save, deadline)
    return budget.kept(state.levels), database.scores


def improve(
    fitness: Fitness,
    budget: Budget,
    config: PruneConfig,
    limits: Sequence[tuple[int, int]],
    seed: int,
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> None:
    """Find `state.levels` for the budget: dynamic programming over the measured costs, then shifts until `deadline`."""
    if state.generation == 0:
        state.levels = cheapest_levels(state.costs, budget, limits)
    state.fitness = fitness.adopt(state.levels)
    logger.info("search: generation %d, KL %.4f", state.generation, state.fitness)
    save(state)
    while state.generation < config.search_generations and state.stale < STALE:
        if time.monotonic() > deadline:
            logger.warning("search: %g minutes are over after generation %d", config.search_minutes, state.generation)
            break
        _evolve(state, fitness, budget, limits, random.Random(f"{seed} {state.generation}"))
        save(state)


def fill_database(database: Database, config: PruneConfig, calibration: torch.Tensor, seed: int) -> None:
    """Scores and Gram matrices of all layers, in one pass over the calibration windows."""
    criterion, runner, geometry = CRITERIA[config.importance], database.runner, database.budget.geometry
    for index, statistics in enumerate(gather_statistics(runner, geometry, calibration, {criterion.needs, "gram"})):
        scores = score_layer(criterion, runner.decoder_layer(index), geometry, statistics, seed + 2 * index)
        grams = {kind: gathered.moments.gram for kind, gathered in zip(KINDS, statistics, strict=True)}
        database.add_layer(scores, grams)


def measure_costs(
    fitness: Fitness,
    limits: Sequence[tuple[int, int]],
    state: SearchState,
    save: Callable[[SearchState], None],
    deadline: float,
) -> None:
    """Fill `state.costs`, coarse levels of all sublayers before finer ones: past `deadline` the finer ones stay unknown."""
    budget = fitness.database.budget
    state.costs = state.costs or [{} for _ in budget.sublayers]
    rounds = [[measured_levels(first, last, steps) for first, last in limits] for steps in COST_ROUNDS]
    total = sum(map(len, rounds[-1]))  # finer rounds measure the coarser ones' levels too
    with tqdm(total=total, initial=sum(map(len, state.costs)), desc="costs", disable=None, leave=False) as progress:
        for count, levels in enumerate(rounds):
            for which, sublayer in enumerate(budget.sublayers):
                if count and time.monotonic() > deadline:
                    logger.warning("search: the time is over in round %d of %d of the costs", count + 1, len(rounds))
                    return
                for level in sorted(levels[which] - state.costs[which].keys()):
                    cost = state.costs[which][level] = sublayer_cost(fitness, which, level)
                    kept = sublayer.levels[level]
                    logger.info("search: layer %2d %s, %d kept: KL %.5f", sublayer.layer, sublayer.kind, kept, cost)
                    save(state)
                    progress.update()


def measured_levels(first: int, last: int, steps: int) -> set[int]:
    """The levels that part those from `first` to `last` into `steps` even steps; none where there is no choice."""
    if first == last:
        return set()
    return {first + round((last - first) * step / steps) for step in range(1, steps + 1)} - {0}


def sublayer_cost(fitness: Fitness, which: int, level: int) -> float:
    """The KL with sublayer `which` alone at `level`, on some of the windows. Raises RunError where it is not finite."""
    levels = [0] * len(fitness.database.budget.sublayers)
    levels[which] = level
    cost = fitness.measure(levels, fitness.some)
    if not math.isfinite(cost):
        sublayer = fitness.database.budget.sublayers[which]
        raise RunError(f"the KL without a part of layer {sublayer.layer}'s {sublayer.kind} is {cost}: try --dtype float32")
    return cost


def cheapest_levels(costs: Sequence[Mapping[int, float]], budget: Budget, limits: Sequence[tuple[int, int]]) -> list[int]:
    """Levels that meet the budget with the least sum of costs, by dynamic programming."""
    every = [interpolated(known, len(sublayer.levels)) for known, sublayer in zip(costs, budget.sublayers, strict=True)]
    levels = knapsack(every, budget.sublayers, limits, budget.target)
    wanted = [float(sublayer.removed(level)) for sublayer, level in zip(budget.sublayers, levels, strict=True)]
    return round_levels(budget.target, budget.sublayers, limits, wanted)


def interpolated(known: Mapping[int, float], count: int) -> list[float]:
    """The cost of each of `count` levels: nothing at the first, as measured where it is known, linear between.

    What removes more counts as no better: a cost below that of a smaller cut is the noise of few tokens.
    """
    import numpy

    points = sorted(known)
    costs = list(itertools.accumulate([0.0, *(known[point] for point in points)], max))
    return numpy.interp(range(count), [0, *points], costs).tolist()


def knapsack(
    costs: Sequence[Sequence[float]], sublayers: Sequence[Sublayer], limits: Sequence[tuple[int, int]], target: int
) -> list[int]:
    """Levels with the least sum of costs that remove `target` parameters or more (dynamic programming over CELLS cells)."""
    import numpy

    cell = max(1, target // CELLS)
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


def _evolve(
    state: SearchState, fitness: Fitness, budget: Budget, limits: Sequence[tuple[int, int]], rng: random.Random
) -> None:
    """One generation: mutants of the best plan, most of them measured on half of the windows only; the best one may win."""
    mutants: list[list[int]] = []
    for _ in range(10 * OFFSPRING):
        mutant = mutate(state.levels, budget, limits, rng)
        if mutant != state.levels and mutant not in mutants:
            mutants.append(mutant)
        if len(mutants) == OFFSPRING:
            break
    mutants.sort(key=lambda levels: fitness.measure(levels, fitness.some))
    best = min(((fitness.measure(levels), levels) for levels in mutants[:SURVIVORS]), default=None)
    state.generation += 1
    state.stale += 1
    if best is not None and best[0] < state.fitness:
        state.levels, state.stale = best[1], 0
        state.fitness = fitness.adopt(state.levels)
    logger.info("search: generation %d, KL %.4f", state.generation, state.fitness)


def mutate(levels: Sequence[int], budget: Budget, limits: Sequence[tuple[int, int]], rng: random.Random) -> list[int]:
    """Shift a few steps from some sublayers to others; the budget is met as before."""
    sublayers = budget.sublayers
    wanted = [float(sublayer.removed(level)) for sublayer, level in zip(sublayers, levels, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        more, less = rng.sample(range(len(levels)), 2) if len(levels) > 1 else (0, 0)
        shift = rng.choice((1, 1, 2, 3)) * max(sublayers[more].removed(1), sublayers[less].removed(1))
        wanted[more] += shift
        wanted[less] -= shift
    return round_levels(budget.target, sublayers, limits, wanted)
