"""A healed model that is not what the search forecast is held against the defaults', and the better one is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_windows

import llama3_unbalanced_pruning_gqa_aware as script
from LLMPruner.config import PruneConfig
from LLMPruner.model.load import LoadedModel, load_model
from LLMPruner.model.source import find_model
from LLMPruner.stages import steps
from LLMPruner.stages.check import Yardstick, default_job
from LLMPruner.stages.job import PruneJob

SMALL = ["--layer_importance_samples=6", "--channel_importance_samples=8", "--calibration_seq_len=64", "--prune_mlp"]
SMALL += ["--layer_importance_seq_len=32", "--dtype=float32", "--device=cpu", "--pruning_ratio=0.4", "--seed=3"]
BEST = ["--preset=best", "--search_tokens=128", "--repair_samples=8", "--self_samples=3", "--distill_epochs=1"]


@pytest.fixture
def flags(trained_dir, data_dir, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [f"--base_model={trained_dir}", f"--data_dir={data_dir}", *SMALL]


def spoil_in_order(monkeypatch, *factors: float) -> None:
    """The first, second, ... model that is healed has the output weights of its first attention multiplied."""
    heal, left = steps.apply, list(factors)

    def spoiled(runner, *args) -> None:
        heal(runner, *args)
        with runner.store.layer(0) as layer:
            layer.self_attn.o_proj.weight.data *= left.pop(0)

    monkeypatch.setattr(steps, "apply", spoiled)


def saved(name: str) -> LoadedModel:
    return load_model(find_model(f"prune_log/{name}/pytorch_model.bin", "--model_path"), dtype="float32", device="cpu")


def check_of(name: str) -> dict:
    stages = json.loads(Path(f"prune_log/{name}/metrics.json").read_text())["stages"]
    return next(stage["check"] for stage in stages if stage["stage"] == "check")


def same(one: LoadedModel, other: LoadedModel) -> bool:
    weights = other.model.state_dict()
    return one.plan == other.plan and all(weight.equal(weights[key]) for key, weight in one.model.state_dict().items())


def test_what_is_as_forecast_stays(flags):
    assert script.main([*flags, *BEST, "--save_ckpt_log_name=exp"]) == 0
    found = check_of("exp")
    assert found.keys() == {"forecast", "healed"} and 0 < found["healed"]["kl"] <= found["forecast"]
    assert 1 < found["healed"]["longest"] < 10
    assert saved("exp").provenance["settings"]["pruning_strategy"] == "search"


def test_a_spoiled_model_gives_way_to_the_defaults(flags, monkeypatch):
    assert script.main([*flags, "--save_ckpt_log_name=plain"]) == 0
    spoil_in_order(monkeypatch, 100.0, 1.0)
    assert script.main([*flags, *BEST, "--save_ckpt_log_name=exp", "--export", "hf"]) == 0
    found, exp = check_of("exp"), saved("exp")
    assert found["healed"]["longest"] > 10 and found["default"]["kl"] < found["healed"]["kl"]
    assert same(exp, saved("plain")) and exp.provenance["settings"]["pruning_strategy"] == "inverse"
    for name in ("prune_log/exp/pruning_plan.json", "prune_log/exp/hf/pruning_plan.json"):
        assert exp.plan.to_json() == Path(name).read_text().strip(), name
    assert "theirs is taken" in next(Path("prune_log/exp").glob("*/training.log")).read_text()


def test_it_stays_where_the_defaults_are_worse(flags, monkeypatch):
    spoil_in_order(monkeypatch, 5.0, 100.0)
    assert script.main([*flags, *BEST, "--save_ckpt_log_name=exp"]) == 0
    found = check_of("exp")
    assert found["forecast"] < found["healed"]["kl"] < found["default"]["kl"]
    assert saved("exp").provenance["settings"]["pruning_strategy"] == "search"


def test_a_budget_that_the_defaults_cannot_meet_leaves_the_model(flags, monkeypatch):
    spoil_in_order(monkeypatch, 100.0)
    most = ["--allow_sublayer_removal", "--max_pruning_rate=1.0", "--pruning_ratio=0.71"]
    assert script.main([*flags, *BEST, *most, "--save_ckpt_log_name=exp"]) == 0
    assert check_of("exp").keys() == {"forecast", "healed"}
    assert "cannot meet this budget" in next(Path("prune_log/exp").glob("*/training.log")).read_text()


def test_the_defaults_job_keeps_the_budget_and_drops_the_rest(trained_dir):
    config = PruneConfig(pruning_ratio=0.3, prune_mlp=True, round_to=4, pruning_strategy="search", importance="obs")
    config = replace(config, repair_samples=9, self_samples=2, distill_epochs=1, distill_model_epochs=1, distill_last=2)
    job = PruneJob(find_model(str(trained_dir), "--base_model"), replace(config, allow_sublayer_removal=True))
    assert default_job(job).prune == PruneConfig(pruning_ratio=0.3, prune_mlp=True, round_to=4)


def test_a_model_without_finite_answers_holds_nothing(trained_dir):
    loaded = load_model(find_model(str(trained_dir), "--base_model"), dtype="float32", device="cpu")
    yardstick = Yardstick.of(loaded.runner, random_windows(2, 12), 0.5)
    dense = yardstick.verdict(loaded.runner)
    assert dense.kl == pytest.approx(0, abs=1e-6) and dense.longest == 1.0 and yardstick.holds(dense)
    with torch.no_grad():
        loaded.model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    assert not yardstick.holds(yardstick.verdict(loaded.runner))


@pytest.mark.parametrize("spoil", [0.0, math.nan])
def test_a_defaults_model_that_cannot_be_made_or_is_worse_than_nothing_loses(flags, monkeypatch, spoil):
    spoil_in_order(monkeypatch, 100.0, math.nan)
    if not spoil:
        monkeypatch.setattr("LLMPruner.stages.check.make_default", lambda *_: _no_memory())
    assert script.main([*flags, *BEST, "--save_ckpt_log_name=exp"]) == 0
    found = check_of("exp")
    assert found["healed"]["kl"] > found["forecast"] and found.get("default", {"kl": None})["kl"] is None
    assert saved("exp").provenance["settings"]["pruning_strategy"] == "search"


def _no_memory() -> None:
    raise torch.OutOfMemoryError("no memory")
