"""The model card: what was removed, how it came about, what it scores and how it loads."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from LLMPruner.evaluator.ppl import Perplexity
from LLMPruner.export.card import model_card
from LLMPruner.export.layout import filled, stock
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

GEOMETRY = Geometry(300, 64, 96, 4, 8, 2, 8)
PLAN = PruningPlan.dense(GEOMETRY).with_layer(1, LayerPlan((0,), tuple(range(40))))
RECORD = {
    "base_model": "/models/tiny",
    "command": "python prune.py --prune_mlp",
    "calibration": {"corpus": "ptb", "split": "train"},
    "settings": {"importance": "taylor", "pruning_strategy": "search", "repair": "least_squares"},
    "seed": 42,
    "versions": {"torch": "2.0", "python": "3.11"},
}


def card(plan: PruningPlan = PLAN, layout: PruningPlan | None = None, own_code: bool = True, measured=None, **record) -> str:
    loaded = SimpleNamespace(plan=plan, provenance=RECORD | record)
    return model_card(loaded, layout or filled(plan), measured or {}, own_code=own_code)


def test_the_summary_counts_what_was_removed():
    removed = GEOMETRY.dense_params - PLAN.total_params
    text = card()
    assert f"# Pruned Llama, {PLAN.total_params:,} parameters" in text
    assert f"Of {GEOMETRY.dense_params:,} parameters {removed:,} ({removed / GEOMETRY.dense_params:.1%}) were removed" in text
    assert "4 query heads" in text and "zeros" not in text and "bias" not in text
    assert f"Of {10**6:,} parameters" in card(dense_parameters=10**6), "of a uniform export the record knows the dense size"


def test_padding_and_added_biases_are_confessed():
    layout = stock(PLAN)
    padding = layout.total_params - PLAN.total_params
    assert f"{padding:,} zeros" in card(layout=layout, own_code=False)
    assert "bias that the dense model has not" in card(replace(PLAN, output_bias=True))


def test_how_it_loads_depends_on_whose_class_it_is():
    assert "trust_remote_code=True" in card() and "--trust-remote-code" in card()
    padded = card(layout=stock(PLAN), own_code=False)
    assert "trust" not in padded and "padded to the widest" in padded
    uniform = PruningPlan(GEOMETRY, (LayerPlan((0,), tuple(range(40))),) * 4)
    assert "padded" not in card(uniform, stock(uniform), own_code=False)


def test_provenance_is_a_row_for_each_known_fact():
    text = card()
    for row in (
        "| base model | `/models/tiny` |",
        "| calibration | `ptb train` |",
        "| allocation | `search` |",
        "| seed | `42` |",
    ):
        assert row in text
    assert "| versions | `torch 2.0, python 3.11` |" in text
    assert "fine-tuning" not in text and "epochs" not in text
    assert "| fine-tuning | `python tune.py` |" in card(finetune={"command": "python tune.py"})
    assert "None" not in card(base_model=None, settings=None, calibration=None, versions=None)


@pytest.mark.parametrize("measured", [{}, {"pruned": []}])
def test_what_was_not_measured_is_said_to_be_so(measured):
    assert "Not measured by the run that wrote this export." in card(measured=measured)


def test_perplexity_is_a_row_for_each_role_and_corpus():
    measured = {
        "original": [Perplexity("ptb", "test", 64, 3, 189, 12.345).as_dict()],
        "pruned": [Perplexity("ptb", "test", 64, 3, 189, math.inf).as_dict()],
    }
    text = card(measured=measured)
    assert "| original | ptb | test | 3 | 64 | 12.35 |" in text and "| pruned | ptb | test | 3 | 64 | not finite |" in text


def test_the_layers_are_the_models_own_and_not_the_layouts():
    text = card(PLAN.with_layer(2, LayerPlan((), ())), stock(PLAN))
    rows = [line for line in text.splitlines() if line[:3] in ("| 0", "| 1", "| 2", "| 3")]
    assert rows == ["| 0 | 2 | 96 |", "| 1 | 1 | 40 |", "| 2 | removed | removed |", "| 3 | 2 | 96 |"]
    assert "| layer | KV groups of 2 | channels of 96 |" in text
