"""Steps of a run: each is a stage on its record, and leaves what its function returns or writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import half_pruned, random_windows

from LLMPruner.config import CommonConfig, ExportConfig, PruneConfig
from LLMPruner.evaluator.ppl import measure
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model
from LLMPruner.model.source import find_model
from LLMPruner.run import Run
from LLMPruner.stages import steps


@pytest.fixture
def loaded(trained_dir, tmp_path, monkeypatch) -> LoadedModel:
    monkeypatch.chdir(tmp_path)
    return half_pruned(trained_dir)


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "exp", "script.py", [], seed=0, device="cpu") as run:
        yield run


def test_a_measurement_is_a_stage_with_its_perplexities(loaded, run):
    windows = {"ptb": random_windows(3, 9), "wikitext2": random_windows(2, 9)}
    results = steps.measure(run, loaded, windows, "pruned")
    assert results == measure(LayerRunner.of(loaded.model), windows, "pruned")
    (stage,) = run.stages
    assert stage["stage"] == "evaluate pruned" and stage["ppl"] == [result.as_dict() for result in results]


def test_what_is_saved_is_the_model(loaded, run):
    steps.save(run, loaded, "m.bin")
    again = load_model(find_model(str(run.dir / "m.bin"), "--model_path"), dtype="float32", device="cpu")
    ids = random_windows(2, 9)
    with torch.no_grad():
        assert again.model(input_ids=ids).logits.equal(loaded.model(input_ids=ids).logits)
    assert [stage["stage"] for stage in run.stages] == ["save"]


def test_an_export_has_the_runs_perplexity_on_its_card_and_is_on_its_record(loaded, run):
    run.metrics["ppl"] = {
        "pruned": [result.as_dict() for result in measure(LayerRunner.of(loaded.model), {"ptb": random_windows(3, 9)}, "")]
    }
    steps.export(run, loaded, ExportConfig(("hf", "padded")), "metrics_finetune.json")
    assert f"| {run.metrics['ppl']['pruned'][0]['ppl']:.2f} |" in (run.dir / "hf" / "README.md").read_text()
    assert (run.dir / "padded").is_dir()
    assert json.loads((run.dir / "metrics_finetune.json").read_text())["stages"][-1]["stage"] == "export"


def test_no_export_is_no_stage(loaded, run):
    steps.export(run, loaded, ExportConfig())
    assert run.stages == [] and not Path(run.dir, "metrics.json").exists()


def test_all_settings_of_what_is_learned_reach_the_model(monkeypatch):
    seen = {}
    monkeypatch.setattr("LLMPruner.methods.apply.apply_plan", lambda *args, **options: seen.update(options))
    asked = {"distill_epochs": 3, "distill_model_epochs": 2, "distill_last": 7, "distill_labels": 0.25}
    steps.apply(None, None, None, PruneConfig(**asked), CommonConfig())
    assert {name: value for name, value in seen.items() if name.startswith("distill")} == asked
