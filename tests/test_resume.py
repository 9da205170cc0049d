"""A run that died anywhere goes on where it stopped and ends bit-identical, or says why it cannot."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import llama3_unbalanced_pruning_gqa_aware as script
from LLMPruner.data.corpora import load_text
from LLMPruner.files import locked
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.finished import FinishedLayers
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model
from LLMPruner.stages import check
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


def files() -> dict[Path, bytes]:
    """What every file of all experiments holds."""
    return {path: path.read_bytes() for path in Path("prune_log").rglob("*") if path.is_file()}


def outcome(name: str) -> tuple[dict[str, torch.Tensor], str, list]:
    """What a run leaves: weights, plan, PPL."""
    folder = Path("prune_log", name)
    tensors, _ = load_checkpoint(folder / "pytorch_model.bin")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not (folder / "work").exists() and json.loads((folder / "journal.json").read_text())["done"]["finished"]
    return tensors, (folder / "pruning_plan.json").read_text(), metrics["ppl"]


@pytest.mark.parametrize("flags", [PLAIN, BEST, [*PLAIN, "--stream=on", "--hidden_gb=0"]], ids=["plain", "best", "streamed"])
def test_a_run_that_died_anywhere_ends_as_an_undisturbed_one(command, dies, flags):
    """A streamed one as one in memory: where weights lie changes nothing."""
    kept = dies(10**6, before=False)
    assert command(*(flag for flag in flags if flag != "--stream=on"), name="whole") == 0
    wanted, total = outcome("whole"), len(kept)
    assert kept.count("layers") >= 4 and kept[-1] == "finished"
    stops = [(stop, False) for stop in range(1, total)] + [(total, True), (kept.index("layers") + 2, True)]
    for stop, before in stops if flags is PLAIN else stops[:: 3 if total > 12 else 1]:
        name = f"died{stop}{before}"
        dies(stop, before=before)
        assert command(*flags, name=name) == 130, kept[stop - 1]
        rest = dies(10**6, before=False)
        assert command(*flags, "--resume", name=name) == 0, kept[stop - 1]
        again = kept[stop - 1 : stop + 1] == ["layers", "check"]  # the defaults' layers are kept just before the verdict
        assert len(rest) == total - stop + before + again, "nothing is done twice"
        stages = [row["stage"] for row in json.loads(Path("prune_log", name, "metrics.json").read_text())["stages"]]
        assert {"load", "save", "evaluate pruned"} <= set(stages), "those of the run that died are told too"
        tensors, plan, ppl = outcome(name)
        assert (plan, ppl) == wanted[1:] and list(tensors) == list(wanted[0])
        assert all(value.equal(wanted[0][key]) for key, value in tensors.items()), kept[stop - 1]
        shutil.rmtree(Path("prune_log", name))


def test_a_run_may_go_on_with_its_weights_elsewhere(command, dies):
    assert command(*PLAIN, name="whole") == 0
    dies(9, before=False)
    assert command(*PLAIN, "--stream=on") == 130
    dies(10**6, before=False)
    assert command(*PLAIN, "--stream=off", "--resume") == 0
    (weights, *rest), (wanted, *others) = outcome("exp"), outcome("whole")
    assert rest == others and all(value.equal(wanted[name]) for name, value in weights.items())


def test_a_streamed_model_is_measured_and_diagnosed_as_one_in_memory(command, data_dir, capsys):
    import diagnose_model
    import evaluate_models

    assert command("--pruning_ratio=0.3", "--stream=on") == 0
    path, found = "prune_log/exp/pytorch_model.bin", []
    for stream in ("on", "off"):
        flags = [f"--pruned_model={path}", f"--data_dir={data_dir}", "--seq_len=64", f"--stream={stream}", "--dtype=float32"]
        assert evaluate_models.main([*flags, f"--save_results={stream}.json"]) == 0
        found.append(json.loads(Path(f"{stream}.json").read_text())["models"])
        capsys.readouterr()
        diagnose_model.main([f"--model_path={path}", "--test_forward", f"--stream={stream}"])
        told = [line for line in capsys.readouterr().out.splitlines() if "forward:" in line or "generation:" in line]
        assert any("not run" in line for line in told) == (stream == "on")
        found[-1] = found[-1], [line for line in told if "forward:" in line]
    assert found[0] == found[1] and found[0][1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset=best"], "--pruning_strategy search needs all weights"),
        (["--self_samples=2"], "--self_samples needs all weights"),
        (["--distill_model_epochs=1"], "--distill_model_epochs needs all weights"),
        (["--finetune", "--finetune_seq_len=64"], "test_finetuning.py"),
        (["--hidden_gb=-1"], "--hidden_gb must be 0 or more"),
    ],
)
def test_what_cannot_be_streamed_is_refused(command, capsys, flags, words):
    assert command("--stream=on", *flags) == 2
    assert words in capsys.readouterr().err and not Path("prune_log").exists()


@pytest.mark.parametrize("size", [20_000, 200_000], ids=["a layer does not fit", "the model does not fit"])
def test_where_the_disk_is_full_nothing_is_torn_and_the_run_goes_on_later(command, capsys, size):
    """A real limit of the size of a file, as of a small file system."""
    assert command(*PLAIN, name="whole") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert command(*PLAIN) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "the disk is full" in error and "--resume" in error and error.count("error:") == 1
    assert not [path for path in Path("prune_log/exp").rglob(".*") if path.is_file()], "no half-written file"
    assert not Path("prune_log/exp/pytorch_model.bin").exists()
    assert command(*PLAIN, "--resume") == 0
    (weights, *rest), (wanted, *others) = outcome("exp"), outcome("whole")
    assert rest == others and all(value.equal(wanted[name]) for name, value in weights.items())


def test_where_memory_runs_out_the_sentence_says_what_helps(command, monkeypatch, capsys):
    from LLMPruner.model.forward import LayerRunner

    def greedy(*_):
        return torch.empty(1 << 50)

    monkeypatch.setattr(LayerRunner, "_observed", greedy)
    assert command() == 1
    error = capsys.readouterr().err
    assert "memory ran out" in error and "--stream on" in error and "Traceback" not in error


def test_two_runs_under_one_name_do_not_meet(command, capsys):
    Path("prune_log/exp/2026-01-01_00-00-00").mkdir(parents=True)
    with locked(Path("prune_log/exp")):
        assert command() == 2
    assert "another run is at work in prune_log/exp" in capsys.readouterr().err
    assert len(list(Path("prune_log/exp").iterdir())) == 1
    assert command() == 0


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_finished_layer_that_is_damaged_stops_the_run_that_goes_on(command, dies, capsys, damage):
    dies(7, before=False)
    assert command() == 130
    dies(10**6, before=False)
    file = next(Path("prune_log/exp/work").glob("layer_*.safetensors"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    assert command("--resume") == 1
    assert f"{file} cannot be read" in capsys.readouterr().err
    assert command() == 0, "without --resume it begins anew"


@pytest.mark.parametrize("kept", ["layers", "check", "save"])
def test_where_the_check_took_the_defaults_model_a_run_goes_on_with_that(command, dies, monkeypatch, kept):
    def defaults(job, loaded, yardstick, record):
        plain = check.default_job(job)
        other = load_model(job.source, dtype="float32", device="cpu", tokenizer=loaded.tokenizer)
        check.make_default(plain, other)
        return plain, other

    monkeypatch.setattr(check, "better", defaults)
    seen = dies(10**6, before=False)
    assert command(*BEST, name="whole") == 0
    last = len(seen) - seen[::-1].index(kept)
    dies(last, before=False)
    assert command(*BEST) == 130
    dies(10**6, before=False)
    assert command(*BEST, "--resume") == 0
    (weights, *rest), (wanted, *others) = outcome("exp"), outcome("whole")
    assert rest == others and all(value.equal(wanted[name]) for name, value in weights.items())
    assert find_model("prune_log/exp/pytorch_model.bin", "--m").provenance["settings"]["pruning_strategy"] == "inverse"


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
    before = files()
    assert command("--test_after_prune", *changes, "--resume") == 2
    assert words in capsys.readouterr().err
    assert files() == before


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
    dies(7, before=False)
    assert command("--pruning_ratio=0.3") == 130 and Path("prune_log/exp/work").is_dir()
    seen = dies(10**6, before=False)
    assert command() == 0
    assert seen.count("layers") == 4 and not Path("prune_log/exp/work").exists()
    assert command(name="other") == 0 and outcome("other")[1] == outcome("exp")[1]


def test_what_lies_in_work_never_passes_for_another_runs(command, tmp_path):
    """A folder elsewhere, as one that cannot be removed: it is emptied, and files of another run in it do not count."""
    place = tmp_path / "scratch"
    place.mkdir()
    Path("prune_log/exp").mkdir(parents=True)
    Path("prune_log/exp/work").symlink_to(place)
    assert command("--seed=1") == 0 and not any(place.iterdir())
    kept = FinishedLayers(place, "another run")
    kept.write({0: tiny_model().model.layers[0]}, "healed")
    assert FinishedLayers(place, "this run").state(0) is None and FinishedLayers(place, "another run").state(0) == "healed"
    assert command("--seed=2") == 0 and command("--seed=2", name="clean") == 0
    weights, wanted = (load_checkpoint(Path("prune_log", name, "pytorch_model.bin"))[0] for name in ("exp", "clean"))
    assert all(value.equal(wanted[name]) for name, value in weights.items())


def test_a_changed_config_or_file_of_scores_does_not_continue_a_run(command, dies, capsys, trained_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained_dir, model)
    assert command(name="scores") == 0
    shutil.copy("prune_log/scores/layer_importance_config.json", "scores.json")
    flags = ["--skip_importance_analysis", "--layer_importance_config=scores.json"]
    dies(7, before=False)
    assert command(*flags, base=model) == 130
    scores = json.loads(Path("scores.json").read_text())
    Path("scores.json").write_text(json.dumps(scores | {"scores": scores["scores"][::-1]}))
    assert command(*flags, "--resume", base=model) == 2
    assert "the file of --layer_importance_config is another one" in capsys.readouterr().err
    Path("scores.json").write_text(Path("prune_log/scores/layer_importance_config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert command(*flags, "--resume", base=model) == 2
    assert "the model is another one" in capsys.readouterr().err


def test_a_model_that_is_gone_is_written_again_and_says_the_first_command(command, dies):
    kept = dies(10**6, before=False)
    assert command("--test_after_prune", name="whole") == 0
    dies(kept.index("save") + 1, before=False)
    assert command("--test_after_prune") == 130
    Path("prune_log/exp/pytorch_model.bin").unlink()
    dies(10**6, before=False)
    assert command("--test_after_prune", "--resume") == 0
    (weights, *rest), (wanted, *others) = outcome("exp"), outcome("whole")
    assert rest == others and all(value.equal(wanted[name]) for name, value in weights.items())
    assert "--resume" not in find_model("prune_log/exp/pytorch_model.bin", "--m").provenance["command"]


def test_a_refused_model_leaves_an_interrupted_run_as_it_was(command, dies, capsys, trained_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": -1}))
    assert command(base=model) == 2 and not Path("prune_log").exists()
    dies(7, before=False)
    assert command() == 130
    before = files()
    assert command(base=model) == 2
    assert files() == before


def test_a_finished_run_of_other_settings_is_not_overwritten(command, capsys):
    assert command() == 0
    before = Path("prune_log/exp/pytorch_model.bin").read_bytes()
    assert command("--pruning_ratio=0.4", "--resume") == 2
    assert "--pruning_ratio was 0.25, is 0.4" in capsys.readouterr().err
    assert Path("prune_log/exp/pytorch_model.bin").read_bytes() == before


def test_scores_that_are_nowhere_are_one_sentence_also_of_a_run_that_goes_on(command, dies, capsys):
    flags = ["--skip_importance_analysis", "--layer_importance_config=nowhere.json"]
    dies(4, before=False)
    assert command() == 130
    assert command("--resume", *flags) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_with_nothing_to_go_on_with_the_command_says_so(command, capsys):
    assert command("--resume") == 2
    assert "no interrupted run" in capsys.readouterr().err and not Path("prune_log").exists()
