"""A run that died anywhere goes on where it stopped and ends bit-identical, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import llama3_unbalanced_pruning_gqa_aware as script
from LLMPruner.data.corpora import load_text
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.finished import FinishedLayers
from LLMPruner.stages.journal import Journal

SMALL = ["--layer_importance_samples=6", "--channel_importance_samples=8", "--calibration_seq_len=64", "--eval_seq_len=64"]
SMALL += ["--layer_importance_seq_len=32", "--eval_samples=8", "--dtype=float32", "--device=cpu", "--prune_mlp"]
PLAIN = ["--test_original_ppl", "--test_after_prune", "--export=hf"]
BEST = [
    "--preset=best",
    "--search_tokens=128",
    "--self_samples=2",
    "--repair_samples=6",
    "--distill_epochs=1",
    "--test_after_prune",
]
BEST += ["--search_generations=1"]


@pytest.fixture
def command(trained_dir, data_dir, tmp_path, monkeypatch):
    """Runs the script in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, name="exp", base=trained_dir):
        flags = [f"--base_model={base}", f"--data_dir={data_dir}", f"--save_ckpt_log_name={name}", *SMALL, *flags]
        return script.main(flags)

    return run


@pytest.fixture
def dies(monkeypatch):
    """Lets the process die at the `n`th thing that a run keeps on disk, before or after it is kept; counts them."""
    record, write = Journal.record, FinishedLayers.write

    def at(count: int, *, before: bool) -> list[str]:
        kept: list[str] = []

        def watch(original, name):
            def watched(self, *args):
                kept.append(name or args[0])
                if before and len(kept) == count:
                    raise KeyboardInterrupt
                original(self, *args)
                if len(kept) == count:
                    raise KeyboardInterrupt

            return watched

        monkeypatch.setattr(Journal, "record", watch(record, None))
        monkeypatch.setattr(FinishedLayers, "write", watch(write, "layers"))
        return kept

    return at


def outcome(name: str) -> tuple[dict[str, torch.Tensor], str, list]:
    """What a run leaves: weights, plan, PPL."""
    folder = Path("prune_log", name)
    tensors, _ = load_checkpoint(folder / "pytorch_model.bin")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not (folder / "work").exists() and json.loads((folder / "journal.json").read_text())["done"]["finished"]
    return tensors, (folder / "pruning_plan.json").read_text(), metrics["ppl"]


@pytest.mark.parametrize("flags", [PLAIN, BEST], ids=["plain", "best"])
def test_a_run_that_died_anywhere_ends_as_an_undisturbed_one(command, dies, flags):
    kept = dies(10**6, before=False)
    assert command(*flags, name="whole") == 0
    wanted, total = outcome("whole"), len(kept)
    assert kept.count("layers") >= 4 and kept[-1] == "finished"
    stops = [(stop, False) for stop in range(1, total)] + [(total, True), (kept.index("layers") + 2, True)]
    for stop, before in stops if flags is PLAIN else stops[:: 3 if total > 12 else 1]:
        name = f"died{stop}{before}"
        dies(stop, before=before)
        assert command(*flags, name=name) == 130, kept[stop - 1]
        rest = dies(10**6, before=False)
        assert command(*flags, "--resume", name=name) == 0, kept[stop - 1]
        assert len(rest) == total - stop + before, "nothing is done twice"
        tensors, plan, ppl = outcome(name)
        assert (plan, ppl) == wanted[1:] and list(tensors) == list(wanted[0])
        assert all(value.equal(wanted[0][key]) for key, value in tensors.items()), kept[stop - 1]
        shutil.rmtree(Path("prune_log", name))


def test_a_finished_run_is_left_as_it_is(command, capsys):
    assert command("--pruning_ratio=0.2") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("prune_log").rglob("*")}
    assert command("--pruning_ratio=0.2", "--resume") == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("prune_log").rglob("*")} == before
    assert command("--pruning_ratio=0.2") == 0, "without --resume it begins anew"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--pruning_ratio=0.3"], "--pruning_ratio was 0.25, is 0.3"),
        (["--seed=7"], "--seed was 42, is 7"),
        (["--repair=bias"], "--repair was 'least_squares', is 'bias'"),
        (["--eval_samples=4", "--test_after_prune"], "--eval_samples was 8, is 4"),
        (["--export=hf"], "--export"),
    ],
)
def test_another_command_does_not_continue_a_run(command, dies, capsys, changes, words):
    dies(4, before=False)
    assert command("--test_after_prune") == 130
    before = {path: path.read_bytes() for path in Path("prune_log").rglob("*") if path.is_file()}
    assert command("--test_after_prune", *changes, "--resume") == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("prune_log").rglob("*") if path.is_file()} == before


def test_another_model_or_text_does_not_continue_a_run(command, dies, capsys, trained_dir, data_dir, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(trained_dir, model)
    shutil.copytree(data_dir, data)
    dies(4, before=False)
    assert command(f"--data_dir={data}", base=model) == 130
    text = (data / "wikitext-2-raw" / "train.txt").read_text()
    (data / "wikitext-2-raw" / "train.txt").write_text(text[::-1])
    load_text.cache_clear()  # of this process, as if it were another
    assert command(f"--data_dir={data}", "--resume", base=model) == 2
    assert "the text of the corpora is another one" in capsys.readouterr().err
    (data / "wikitext-2-raw" / "train.txt").write_text(text)
    load_text.cache_clear()
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert command(f"--data_dir={data}", "--resume", base=model) == 2
    assert "the model is another one" in capsys.readouterr().err


def test_a_new_run_removes_what_a_dead_one_left(command, dies):
    dies(4, before=False)
    assert command("--pruning_ratio=0.3") == 130 and Path("prune_log/exp/work").is_dir()
    seen = dies(10**6, before=False)
    assert command() == 0
    assert seen.count("layers") == 4 and not Path("prune_log/exp/work").exists()
    assert command(name="other") == 0 and outcome("other")[1] == outcome("exp")[1]


def test_with_nothing_to_go_on_with_the_command_says_so(command, capsys):
    assert command("--resume") == 2
    assert "no interrupted run" in capsys.readouterr().err and not Path("prune_log").exists()
