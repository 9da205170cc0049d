"""The database: the best units of every level, healed as the repair heals, and a model that is dense again afterwards."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model

from LLMPruner.config import PruneConfig
from LLMPruner.families.slicing import output_columns, output_projection
from LLMPruner.importance.allocation import keep_best_units
from LLMPruner.importance.budget import make_budget
from LLMPruner.importance.criteria import gather_statistics
from LLMPruner.importance.search.database import Database, _packed, _unpacked
from LLMPruner.importance.search.search import fill_database
from LLMPruner.methods.apply import apply_plan
from LLMPruner.methods.repair import solve_own
from LLMPruner.model.forward import LayerRunner

CONFIG = PruneConfig(
    0.3, prune_mlp=True, importance="magnitude", pruning_strategy="search", allow_sublayer_removal=True, max_pruning_rate=1.0
)
CALIBRATION, IDS = random_windows(12, 16, seed=1), random_windows(2, 9, seed=2)


def filled(model, *, heals: bool = True) -> Database:
    """A database over all sublayers of a tiny model."""
    budget = make_budget(geometry_of(model), CONFIG)
    database = Database(LayerRunner.of(model), budget.geometry, budget.sublayers, heals=heals)
    fill_database(database, CONFIG, CALIBRATION, 0)
    return database


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def facts(model) -> list[object]:
    """Modules by identity, where every weight lies, and the widths that the MLPs state."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    weights = [(name, parameter.data_ptr(), parameter.shape) for name, parameter in model.named_parameters()]
    return [modules, weights, [layer.mlp.intermediate_size for layer in model.model.layers]]


@each_architecture
@pytest.mark.parametrize("removed", [False, True], ids=["smaller", "removed"])
def test_the_model_is_dense_again_to_the_last_module_and_stated_width(changes, removed):
    model, dense = tiny_model(**changes), tiny_model(**changes)
    database, before = filled(model), facts(model)
    with database.replaced([len(sublayer.levels) - 1 if removed else 1 for sublayer in database.sublayers]):
        assert not answer(model).equal(answer(dense))
        if not removed:
            assert all(layer.mlp.intermediate_size == layer.mlp.down_proj.in_features < 96 for layer in model.model.layers)
    assert facts(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    assert answer(model).equal(answer(dense))


def test_the_model_is_dense_again_after_an_interrupt_too():
    model = tiny_model()
    database, before = filled(model), facts(model)
    with pytest.raises(KeyboardInterrupt), database.replaced([1] * len(database.sublayers)):
        raise KeyboardInterrupt
    assert facts(model) == before


@each_architecture
def test_an_unhealed_plan_in_place_is_the_model_that_the_plan_makes(changes):
    model, pruned = tiny_model(**changes), tiny_model(**changes)
    database = filled(model, heals=False)
    levels = [index % len(sublayer.levels) for index, sublayer in enumerate(database.sublayers)]
    kept = {(s.layer, s.kind): s.levels[level] for s, level in zip(database.sublayers, levels, strict=True)}
    apply_plan(LayerRunner.of(pruned), keep_best_units(database.geometry, kept, database.scores))
    with database.replaced(levels):
        torch.testing.assert_close(answer(model), answer(pruned))
    assert 0 in kept.values() or changes.get("num_key_value_heads"), "or no removed sublayer is tried"


def test_only_layers_from_the_start_on_are_replaced():
    model = tiny_model()
    database = filled(model)
    with database.replaced([1] * len(database.sublayers), start=2):
        assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [16, 16, 8, 8]


def test_a_variant_keeps_the_best_units_with_output_weights_solved_on_the_dense_models_activations():
    model = tiny_model()
    database, geometry = filled(model), geometry_of(model)
    statistics = list(gather_statistics(database.runner, geometry, CALIBRATION, {"gram"}))
    for which, sublayer in enumerate(database.sublayers):
        part = geometry.table.sublayer(sublayer.kind)
        kept, healed = database.variant(which, 1)
        scores = database.scores[sublayer.layer].of(sublayer.kind)
        assert kept == tuple(sorted(scores.argsort(descending=True)[: sublayer.levels[1]].tolist()))
        weight = output_projection(model.model.layers[sublayer.layer], part).weight.detach()
        gram = statistics[sublayer.layer][geometry.table.sublayers.index(part)].moments.gram
        columns = output_columns(part, kept, geometry)
        solved = solve_own(weight, gram, columns)
        assert (healed - solved).norm() < 0.1 * (solved - weight[:, columns]).norm(), "its Gram matrix is in half precision"


def test_the_weights_of_two_plans_are_held_and_no_more():
    database = filled(tiny_model())
    for level in (1, 2, 3):
        for which, sublayer in enumerate(database.sublayers):
            database.variant(which, min(level, len(sublayer.levels) - 1))
    held = list(database._variants)
    assert len(held) == 2 * len(database.sublayers)
    database.variant(*held[0])
    assert list(database._variants) == [*held[1:], held[0]], "what was asked for last is held longest"


def test_a_gram_matrix_in_half_precision_costs_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 64, generator=generator) * torch.logspace(-3, 3, 64)
    gram = rows.T @ rows / 500
    scale = gram.diagonal().sqrt()
    error = (_unpacked(_packed(gram)) - gram) / scale / scale.unsqueeze(1)
    assert error.abs().max() < 1e-3 and _packed(gram)[0].dtype == torch.float16
