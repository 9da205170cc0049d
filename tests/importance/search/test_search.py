"""The search: offspring within the budget, costs and fitness as defined, an end in time, and the model as it was."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.config import PruneConfig
from LLMPruner.errors import RunError
from LLMPruner.importance.allocation import keep_best_units
from LLMPruner.importance.budget import Prunable, level_limits, make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.search import database as database_module
from LLMPruner.importance.search import search as search_module
from LLMPruner.importance.search.database import Database
from LLMPruner.importance.search.knapsack import knapsack
from LLMPruner.importance.search.search import Fitness, find_levels, measured_levels, prepare, shifted, shifted_levels
from LLMPruner.importance.search.state import SearchState
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.head import Head

CALIBRATION = random_windows(12, 16, seed=1)
HELD_OUT = random_windows(4, 16, seed=2)


def request(**settings) -> PruneConfig:
    settings = {"pruning_ratio": 0.3, "prune_mlp": True, "pruning_strategy": "search", "importance": "obs"} | settings
    return PruneConfig(**settings, search_generations=3)


def run(model, config: PruneConfig, state: SearchState | None = None, save=lambda state: None, deadline=math.inf):
    budget = make_budget(geometry_of(model), config)
    state = SearchState() if state is None else state
    limits = level_limits(budget, config, None)
    fitness = prepare(LayerRunner.of(model), budget, config, CALIBRATION, HELD_OUT, seed=0)
    find_levels(fitness, budget, config, limits=limits, state=state, save=save, deadline=deadline)
    return budget, budget.kept(state.levels), fitness.database.scores, state


@given(st.integers(0, 10**6))
def test_offspring_meet_the_budget_within_their_limits_and_shifts(seed):
    config = request(max_pruning_rate=0.7, freeze_top_n_layers=1)
    budget = make_budget(geometry_of(MODEL), config)
    limits = level_limits(budget, config, [1.0, 5.0, 2.0, 3.0])
    assert limits[2] == limits[3] == (0, 0), "layer 1 is the most important one"
    costs, rng = [[0.1 * i for i in range(len(s.levels))] for s in budget.sublayers], random.Random(seed)
    state = SearchState(levels=knapsack(costs, budget.sublayers, limits, budget.target))
    for width in (1 / 3, 2 / 3, 1.0):
        state.shifts = [{level: rng.random() for level in shifted(*pair)} for pair in zip(state.levels, limits, strict=True)]
        levels = shifted_levels(state, 0.5, budget, width)
        removed = sum(s.removed(level) for s, level in zip(budget.sublayers, levels, strict=True))
        step = 4 * budget.geometry.unit_params("mlp") + budget.geometry.unit_params("attention")
        assert budget.target <= removed < budget.target + step
        for level, before, known, (low, high) in zip(levels, state.levels, state.shifts, limits, strict=True):
            assert low <= level <= high
            assert abs(level - before) <= math.ceil(width * max((abs(other - before) for other in known), default=0))
        state.levels = levels


def test_offspring_take_from_where_it_costs_little_and_give_to_where_it_costs_much():
    """Two sublayers of equal units: one is cheap to shrink further, the other dear; what the clock left unmeasured stays."""
    sublayers = [Prunable(layer, "mlp", tuple(range(9, 0, -1)), 10) for layer in range(3)]
    budget = SimpleNamespace(sublayers=sublayers, target=120)
    shifts = [{2: 0.9, 6: 1.1}, {2: 0.2, 6: 3.0}, {}]
    state = SearchState(levels=[4, 4, 4], shifts=shifts)
    assert shifted_levels(state, 1.0, budget, 1.0) == [6, 2, 4]
    assert shifted_levels(state, 1.0, budget, 0.5) == [5, 3, 4]
    state.shifts = [{2: 0.2, 6: 3.0}, {2: 0.9, 6: 1.1}, {}]
    assert shifted_levels(state, 1.0, budget, 1.0) == [2, 6, 4]
    state.shifts = [{2: 0.9, 6: 1.5}, {2: 0.9, 6: 1.5}, {2: 0.9, 6: 1.5}]
    assert shifted_levels(state, 1.0, budget, 1.0) == [4, 4, 4], "every shift costs more than it gives"


@pytest.mark.parametrize("generation", [0, 1])
@pytest.mark.parametrize("total, wins", [(0.9, True), (1.0, False), (1.1, False)])
def test_an_offspring_wins_by_the_kl_on_all_windows_whatever_its_half_says(generation, total, wins):
    sublayers = [Prunable(layer, "mlp", tuple(range(9, 0, -1)), 10) for layer in range(2)]
    halves, looked = (slice(0, 3), slice(3, None)), []

    def measure(levels, part=None):
        looked.append((list(levels), part))
        return 1.0 if list(levels) == [4, 4] else total

    budget = SimpleNamespace(sublayers=sublayers, target=80)
    fitness = SimpleNamespace(half=lambda turn: halves[turn], measure=measure)
    state = SearchState([], [4, 4], 1.0, generation, 0, [{2: 0.9, 6: 1.1}, {2: 0.2, 6: 3.0}])
    search_module._evolve(fitness, budget, state)
    assert looked[0] == ([4, 4], halves[generation]), "the shifts are compared on the windows that they were measured on"
    assert all(part is None and levels != [4, 4] for levels, part in looked[1:]) and len(looked) == 3, "two different offspring"
    assert (state.levels != [4, 4], state.stale) == ((True, 0) if wins else (False, 1))
    assert state.fitness == (total if wins else 1.0) and state.generation == generation + 1 and state.shifts == []


def test_a_plan_that_just_meets_a_large_budget_may_stay():
    """Steps as a real model's: rounding them down to cells of its own would make the plan at hand seem to miss the target."""
    steps = {"attention": 294_912, "mlp": 110_592}
    sublayers = [
        Prunable(layer, kind, tuple(range(3 if kind == "attention" else 20, 0, -1)), steps[kind])
        for layer in range(30)
        for kind in steps
    ]
    levels = [1 if sublayer.kind == "attention" else 9 for sublayer in sublayers]
    budget = SimpleNamespace(sublayers=sublayers, target=sum(s.removed(n) for s, n in zip(sublayers, levels, strict=True)))
    sizes = [sublayer.unit_params / steps["mlp"] for sublayer in sublayers]
    sized = enumerate(zip(levels, sizes, strict=True))
    shifts = [{n - 1: 1 - 0.3 * size, n + 1: 1 + (0.5 - place / 500) * size} for place, (n, size) in sized]
    assert shifted_levels(SearchState(levels=levels, shifts=shifts), 1.0, budget, 1.0) == levels


def test_a_generation_shifts_by_a_part_of_the_levels_within_the_limits():
    assert shifted(9, (0, 19)) == [6, 12] and shifted(1, (0, 18)) == [0, 4] and shifted(18, (0, 18)) == [15]
    assert shifted(1, (0, 2)) == [0, 2] and shifted(0, (0, 0)) == [], "KV groups one by one; nothing where there is no choice"


MODEL = tiny_model()


@each_architecture
def test_a_search_meets_the_budget_improves_and_leaves_the_model_as_it_was(changes):
    model, before = tiny_model(**changes), tiny_model(**changes)
    history = []
    budget, kept, units, state = run(model, request(), save=lambda state: history.append(state.fitness))
    plan = keep_best_units(budget.geometry, kept, units)
    step = 4 * budget.geometry.unit_params("mlp")
    assert budget.target <= plan.removed_params < budget.target + step
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    found = [value for value in history if value is not None]
    assert found == sorted(found, reverse=True) and found[-1] == state.fitness
    assert len(state.costs) == len(budget.sublayers) and sum(max(known.values()) for known in state.costs) > 0
    for known, (_, last) in zip(state.costs, level_limits(budget, request(), None), strict=True):
        assert known.keys() == {round(last / 2), last} - {0}


def test_the_cost_of_a_level_is_the_kl_of_the_model_with_that_sublayer_alone_replaced():
    model = tiny_model()
    budget = make_budget(geometry_of(model), request(repair="none", importance="magnitude"))
    database = Database(LayerRunner.of(model), budget.geometry, budget.sublayers, heals=False)
    scores = score_units(database.runner, budget.geometry, "magnitude", windows=CALIBRATION, seed=0)
    for layer in scores:
        database.add_layer(layer, {"attention": torch.eye(64), "mlp": torch.eye(96)})
    which = 3  # the MLP of layer 1
    held_out = random_windows(16, 16, seed=2)
    fitness = Fitness(database, held_out)
    cost = fitness.alone(which, len(budget.sublayers[which].levels) - 1, fitness.some)
    pruned = tiny_model()
    kept = {(1, "mlp"): budget.sublayers[which].levels[-1]}
    apply_plan(LayerRunner.of(pruned), keep_best_units(budget.geometry, kept, scores))
    with torch.no_grad():
        some = held_out[:4]  # costs look at the first quarter, and at every fourth position of it
        dense, other = (m(some).logits[:, ::4].log_softmax(-1) for m in (model, pruned))
    expected = (dense.exp() * (dense - other)).sum(-1).mean()
    assert cost == pytest.approx(expected.item(), rel=1e-3)


@torch.no_grad()
def test_a_fitness_is_the_kl_from_the_dense_model_whatever_plan_was_adopted_before():
    model = tiny_model()
    model.lm_head.weight.mul_(100)  # sharp distributions: the two directions of the KL differ
    budget = make_budget(geometry_of(model), request(repair="none", importance="magnitude"))
    database = Database(LayerRunner.of(model), budget.geometry, budget.sublayers, heals=False)
    for layer in score_units(database.runner, budget.geometry, "magnitude", windows=CALIBRATION, seed=0):
        database.add_layer(layer, {"attention": torch.eye(64), "mlp": torch.eye(96)})
    fitness, last = Fitness(database, HELD_OUT), [len(sublayer.levels) - 1 for sublayer in budget.sublayers]
    dense = model(HELD_OUT).logits[:, ::4].log_softmax(-1)
    middle = [level // 2 for level in last]
    for levels in (last, middle):
        with database.replaced(levels):
            other = model(HELD_OUT).logits[:, ::4].log_softmax(-1)
        expected = (dense.exp() * (dense - other)).sum(-1).mean().item()
        assert fitness.measure(levels) == pytest.approx(expected, rel=1e-3)
        assert fitness.adopt(levels) == pytest.approx(expected, rel=1e-3)
        assert (other.exp() * (other - dense)).sum(-1).mean().item() != pytest.approx(expected, rel=1e-2)


@pytest.fixture
def measures(monkeypatch):
    """What was measured of single sublayers: `(which, level, part)`; the clock goes on by one a measure."""
    measured, measure = [], Fitness.alone
    monkeypatch.setattr(Fitness, "alone", lambda self, *args: measured.append(args) or measure(self, *args))
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=lambda: len(measured)))
    return measured


@pytest.mark.parametrize("more", [0, 1, 3])
def test_time_that_is_over_ends_the_search_with_the_best_plan_so_far(measures, more):
    """Every sublayer is measured once, whatever the clock says; finer levels only while there is time."""
    budget = make_budget(geometry_of(MODEL), request())
    first = [(which, high) for which, (_, high) in enumerate(level_limits(budget, request(), None))]
    deadline = len(first) + more - 1  # `more` measures fit into the time that is left after the first of every sublayer
    _, kept, _, state = run(tiny_model(), request(), deadline=deadline)
    assert [args[:2] for args in measures[: len(first)]] == first and len(measures) == len(first) + more
    assert state.generation == 0 and kept == budget.kept(state.levels)


def test_a_generation_that_runs_out_of_time_changes_nothing_and_a_resumed_search_measures_the_rest(measures):
    start = run(tiny_model(), replace(request(), search_generations=0))[3]
    whole = run(tiny_model(), replace(request(), search_generations=1))[3]
    total, costs = len(measures), sum(map(len, start.costs))
    part = run(tiny_model(), replace(request(), search_generations=1), deadline=total + costs + 2)[3]
    assert len(measures) == total + costs + 3 and part.generation == 0 and part.levels == start.levels
    assert sum(map(len, part.shifts)) == 3
    assert run(tiny_model(), replace(request(), search_generations=1), state=part)[3] == whole
    assert len(measures) == 2 * total - costs, "nothing is measured twice"


def test_generations_look_at_the_halves_in_turn_and_end_when_both_are_exhausted(measures):
    history = []
    config = replace(request(), search_generations=50)
    *_, state = run(tiny_model(), config, save=lambda state: history.append(state.fitness))
    turns = [part for part, _ in itertools.groupby((part.start, part.stop) for _, _, part in measures)]
    assert turns[0] == (0, 1) and turns[1:] == ([(0, 2), (2, None)] * state.generation)[: state.generation]
    assert 2 < state.generation < 50 and state.stale == 2
    assert state.fitness < next(kl for kl in history if kl is not None)


def test_every_generation_shifts_the_best_plan_so_far(monkeypatch):
    state, plans, alone = SearchState(), set(), Fitness.alone

    def watched(fitness, *args):
        if state.levels is not None:
            assert fitness.levels == state.levels
            plans.add(tuple(state.levels))
        return alone(fitness, *args)

    monkeypatch.setattr(Fitness, "alone", watched)
    run(tiny_model(), request(), state=state)
    assert len(plans) > 1, "or this test proves nothing"


def test_a_search_that_ran_out_of_time_continues_to_the_plan_of_one_with_time(monkeypatch):
    """Costs that rise with the square of what is removed: the plan by the coarsest levels, straight lines, is another one."""
    measured, config = [], replace(request(), search_generations=0)
    monkeypatch.setattr(Fitness, "alone", lambda self, *args: measured.append(args[:2]) or args[1] ** 2)
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=lambda: len(measured)))
    whole = run(tiny_model(), config)[3]
    part = run(tiny_model(), config, deadline=0)[3]
    assert part.levels != whole.levels and sum(map(len, part.costs)) < len(set(measured))
    assert run(tiny_model(), config, state=part)[3] == whole


def test_one_database_and_its_costs_serve_every_ratio():
    model, fitness, found = tiny_model(), None, SearchState()
    for ratio in (0.3, 0.15, 0.4):
        config = replace(request(), pruning_ratio=ratio)
        budget = make_budget(geometry_of(model), config)
        limits = level_limits(budget, config, None)
        if fitness is None:
            database = Database(LayerRunner.of(model), budget.geometry, budget.sublayers)
            search_module.fill_database(database, config, CALIBRATION, 0)
            fitness = Fitness(database, HELD_OUT)
            search_module.measure_costs(fitness, limits, found, lambda _: None, math.inf)
        shared = SearchState(costs=found.costs)
        search_module.improve(fitness, budget, config, limits, shared, lambda _: None, math.inf)
        alone = run(tiny_model(), config)[3]
        assert shared.generation > 0 and shared.levels == alone.levels


def test_a_continued_search_obeys_limits_that_have_moved():
    *_, state = run(tiny_model(), request())
    which = next(which for which, level in enumerate(state.levels) if level)
    budget = make_budget(geometry_of(MODEL), request())
    limits = level_limits(budget, request(), None)
    limits[which] = (0, 0)
    fitness = prepare(LayerRunner.of(tiny_model()), budget, request(), CALIBRATION, HELD_OUT, seed=0)
    settings = {"limits": limits, "state": state, "save": lambda _: None, "deadline": math.inf}
    find_levels(fitness, budget, request(), **settings)
    sublayer = budget.sublayers[which]
    assert budget.kept(state.levels)[sublayer.layer, sublayer.kind] == sublayer.levels[0]


@pytest.mark.parametrize("repair, heals", [("least_squares", True), ("bias", False), ("none", False)])
def test_levels_are_healed_where_the_repair_solves_for_weights(repair, heals, monkeypatch):
    solved = []
    monkeypatch.setattr(database_module, "solve_own", lambda weight, gram, kept: solved.append(kept) or weight[:, kept])
    run(tiny_model(), replace(request(repair=repair), search_generations=0))
    assert bool(solved) == heals


def test_only_levels_within_the_limits_are_measured():
    assert [measured_levels(0, 19, steps) for steps in (1, 2, 4)] == [{19}, {10, 19}, {5, 10, 14, 19}]
    assert measured_levels(3, 7, 4) == {4, 5, 6, 7} and measured_levels(2, 3, 4) == {2, 3}
    assert measured_levels(0, 0, 4) == measured_levels(4, 4, 4) == set(), "no choice, nothing to measure"


def test_a_cost_that_is_not_finite_names_its_sublayer(monkeypatch):
    monkeypatch.setattr(Head, "_mean_divergence", lambda *_: math.nan)
    with pytest.raises(RunError, match="layer 0's attention is nan"):
        run(tiny_model(), request())


def test_what_is_known_of_the_dense_model_is_computed_once_where_it_fits(monkeypatch):
    """And measures the same KL, to the last digit, as where it is computed for every measure."""
    config, found, answered = request(), [], []
    original = Head._log_probs

    def counted(head, rows):
        answered.append(len(rows))
        return original(head, rows)

    monkeypatch.setattr(Head, "_log_probs", counted)
    for known in (search_module.KNOWN, 0):
        monkeypatch.setattr(search_module, "KNOWN", known)
        model = tiny_model()
        fitness = prepare(LayerRunner.of(model), make_budget(geometry_of(model), config), config, CALIBRATION, HELD_OUT, seed=0)
        answered.clear()
        found.append([fitness.alone(which, 1, fitness.some) for which in (0, 3)] + [fitness.adopt([1] * len(fitness.levels))])
        found.append(sum(answered))
    assert found[0] == found[2] and 2 * found[1] == found[3]
