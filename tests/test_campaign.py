"""benchmarks/recover.py: from dense to recovered, killed and repeated; a campaign is one set of settings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

PLACE = Path(__file__).resolve().parent.parent / "benchmarks" / "recover.py"
SPEC = importlib.util.spec_from_file_location("recover_campaign", PLACE)
campaign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(campaign)


@pytest.fixture
def command(trained_dir, data_dir, tmp_path, monkeypatch):
    """Runs the campaign on the tiny model; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text((data_dir / "wikitext-2-raw" / "train.txt").read_text())

    def run(*flags, samples=12):
        fixed = ["--output=out", f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--device=cpu"]
        fixed += [f"--samples={samples}", "--seq_len=32", "--eval_samples=4", *flags]
        fixed += ["--flags", "--pruning_strategy=uniform", "--channel_importance_samples=8", "--calibration_seq_len=32"]
        try:
            return campaign.main(fixed)
        except SystemExit as stop:
            return stop.code

    return run


def stamps() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path("out/prune_log").rglob("*") if path.is_file()}


def looked_at(way: str) -> dict[str, float]:
    """The figures of a training's last look at held-out text."""
    return json.loads(Path("out/prune_log", way, "metrics.json").read_text())["training"]["held_out"][-1]


def test_a_campaign_that_stopped_goes_on_and_takes_another_way_later(command, monkeypatch):
    ask = ["--dataset", "notes.txt:0.5", "self:0.5"]
    with monkeypatch.context() as patch:
        patch.setitem(campaign.WAYS, "full_taught", ["--lr=nan"])
        assert command(*ask) == 1
    pruned = stamps()
    assert command(*ask) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert set(results["models"]) == {"dense", "pruned", "full_taught"}
    assert any("self" in name for name in looked_at("full_taught"))
    first = stamps()
    assert pruned.items() <= first.items(), "what was pruned is not pruned again"
    assert command(*ask, "--ways", "full_taught", "lora_taught", "lora") == 0
    assert first.items() <= stamps().items(), "what was trained is not trained again"
    texts = [Path("out/prune_log", way, "self_text.safetensors").read_bytes() for way in ("full_taught", "lora_taught")]
    assert texts[0] == texts[1], "the dense model writes once"
    assert any("wikitext2" in name for name in looked_at("lora"))
    assert not any("self" in name or "notes" in name for name in looked_at("lora")), "the document's way reads --corpus"


@pytest.mark.parametrize(
    ("flags", "samples", "words"),
    [
        (["--dataset", "wikitext2:x"], 12, "no weight"),
        (["--dataset", "nowhere.txt:1"], 12, "nowhere.txt"),
        (["--dataset", "wikitext2:0.99", "self:0.01"], 12, "no window"),
        (["--eval_datasets", "nowhere"], 12, "nowhere"),
        (["--corpus", "self"], 12, "self"),
        (["--base_model", "nowhere"], 12, "nowhere"),
        (["--pruning_ratio", "1.5"], 12, "--pruning_ratio"),
        (["--ways", "magic"], 12, "magic"),
        ([], 0, "--samples"),
    ],
)
def test_a_wrong_campaign_changes_nothing(command, capfd, flags, samples, words):
    assert command(*flags, samples=samples) == 2
    assert words in capfd.readouterr().err and not Path("out").exists()


def test_a_folder_has_one_campaign(command, capsys):
    Path("out").mkdir()
    assert command("--ways", "lora", "--epochs=0") == 2
    Path("out/campaign.json").write_text(json.dumps({"dataset": ["news"]}))
    assert command() == 2
    assert "choose another folder" in capsys.readouterr().err and not Path("out/prune_log").exists()
