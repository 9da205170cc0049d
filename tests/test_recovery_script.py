"""Distillation, mixtures and --resume of the fine-tuning script, and of --finetune in the pruning script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import half_pruned

import llama3_unbalanced_pruning_gqa_aware as pruning
import test_finetuning as script
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.load import save_model
from LLMPruner.stages import teaching
from LLMPruner.stages.journal import Journal
from LLMPruner.trainer import finetuner

INPUT = "prune_log/pruned/pytorch_model.bin"
SMALL = ["--samples=12", "--epochs=2", "--seq_len=32", "--batch_size=2", "--grad_accum=2", "--lr=5e-3", "--eval_samples=4"]
SMALL += ["--dtype=float32", "--device=cpu", "--use_lora"]


@pytest.fixture
def command(trained_dir, data_dir, tmp_path, monkeypatch):
    """Runs the script on a pruned model whose record names its dense one; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    Path(INPUT).parent.mkdir(parents=True)
    save_model(Path(INPUT), half_pruned(trained_dir))

    def run(*flags, name="tuned"):
        try:
            return script.main([f"--model_path={INPUT}", f"--save_name={name}", f"--data_dir={data_dir}", *SMALL, *flags])
        except SystemExit as stop:
            return stop.code

    return run


def metrics(name="tuned", file="metrics.json") -> dict:
    return json.loads(Path("prune_log", name, file).read_text())


def weights(name="tuned") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path("prune_log", name, "pytorch_model_finetuned.bin"))[0]


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def dies_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Lets the process die at the end of so many training steps."""
    end, count = finetuner.Watch.on_step_end, []

    def dies(*args, **more):
        count.append(1)
        if len(count) == steps:
            raise KeyboardInterrupt
        return end(*args, **more)

    patch.setattr(finetuner.Watch, "on_step_end", dies)


@pytest.mark.parametrize("where", ["beside", "cached"])
def test_distillation_on_a_mixture_with_text_that_the_dense_model_writes(command, where, trained_dir):
    flags = ["--distill", f"--teacher_answers={where}", "--dataset", "wikitext2:0.75", "self:0.25", "--test_after"]
    flags += ["--check_steps=3"]
    assert command(*flags) == 0
    found = metrics()
    assert ("teach" in [stage["stage"] for stage in found["stages"]]) == (where == "cached")
    checks = found["training"]["held_out"]
    assert checks[-1]["eval_wikitext2_kl"] < checks[0]["eval_wikitext2_kl"] and "eval_self_kl" in checks[0]
    folder = Path("prune_log/tuned")
    assert (folder / "self_text.safetensors").is_file() and not (folder / "work_finetune").exists()
    _, meta = load_checkpoint(folder / "pytorch_model_finetuned.bin")
    record = json.loads(meta["__provenance__"])["finetune"]
    assert record["corpus"] == "wikitext2:0.75 self:0.25" and record["parts"] == {"wikitext2": 0.75, "self": 0.25}
    assert record["distill"]["distill_alpha"] == 0.5


def test_written_text_is_kept_and_read_again(command, monkeypatch):
    assert command("--dataset", "self") == 0
    first = weights()
    monkeypatch.setattr("LLMPruner.data.self_text.write_windows", lambda *_, **__: pytest.fail("written again"))
    assert command("--dataset", "self") == 0
    assert all(value.equal(first[name]) for name, value in weights().items())


@pytest.mark.parametrize("place", ["record", "answers", "step"])
def test_a_fine_tuning_that_died_is_resumed_and_ends_alike(command, monkeypatch, place):
    flags = ["--distill", "--teacher_answers=cached", "--test_before", "--test_after", "--check_steps=2"]
    assert command(*flags, name="whole") == 0

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "record":
            patch.setattr(Journal, "finish", dies)
        elif place == "answers":
            patch.setattr(script.recover.__globals__["steps"], "measure_once", dies)
        else:
            dies_after(4, patch)
        assert command(*flags, name="dead") == 130
    if place != "record":
        assert not Path("prune_log/dead/pytorch_model_finetuned.bin").exists()
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "load_model", lambda *_, **__: pytest.fail("the teacher was asked again"))
        assert command(*flags, "--resume", name="dead") == 0
    assert all(value.equal(weights("whole")[name]) for name, value in weights("dead").items())
    whole, dead = metrics("whole"), metrics("dead")
    assert whole["ppl"] == dead["ppl"] and whole["training"]["curve"] == dead["training"]["curve"]
    assert not Path("prune_log/dead/work_finetune").exists()
    seen = files()
    assert command(*flags, "--resume", name="dead") == 0 and files() == seen  # nothing is left to do


def test_another_command_is_not_resumed_and_the_difference_is_named(command, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command() == 130
    seen = files()
    for flags, words in (
        (["--lr=1e-4"], "--lr was 0.005, is 0.0001"),
        (["--lora_r=4"], "--lora_r was 8, is 4"),
        (["--dataset", "wikitext2:2"], "--dataset"),
    ):
        assert command(*flags, "--resume") == 2
        assert words in capsys.readouterr().err and files() == seen
    assert command("--resume", name="other") == 2 and "no interrupted run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--distill", "--teacher=/nowhere"], "--teacher"),
        (["--teacher=/nowhere"], "--teacher has nothing to do"),
        (["--distill", "--distill_alpha=0"], "--distill_alpha"),
        (["--distill", "--distill_temperature=nan"], "--distill_temperature"),
        (["--distill", "--teacher_draws=0"], "--teacher_draws"),
        (["--teacher_draws=7"], "need --distill"),
        (["--micro_batch=3"], "must divide"),
        (["--check_steps=0"], "--check_steps"),
        (["--optimizer=adamw_8bit"], "bitsandbytes"),
        (["--dataset", "wikitext2:x"], "no weight"),
        (["--report_to=wandb"], "--report_to"),
    ],
)
def test_wrong_settings_change_nothing(command, capsys, flags, words):
    seen = files()
    assert command(*flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and files() == seen


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_a_launcher_that_splits_the_model_is_refused(command, monkeypatch, capsys, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    seen = files()
    assert command() == 2
    assert kind in capsys.readouterr().err and files() == seen


def test_more_processes_than_windows_are_refused(command, monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    seen = files()
    assert command("--samples=2") == 2
    assert "3 processes cannot share --samples 2" in capsys.readouterr().err and files() == seen


def test_a_disk_without_room_for_checkpoints_and_answers_is_noticed_first(command, monkeypatch, capsys):
    room = 4_000_000  # enough for the model
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": room})())
    seen = files()
    assert command("--distill", "--teacher_draws=9000") == 2
    assert "free" in capsys.readouterr().err and files() == seen


def test_a_teacher_that_reads_other_tokens_is_refused(command, trained_dir, capsys):
    shutil.copytree(trained_dir, "other")
    path = Path("other/tokenizer.json")
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    first, second = [token for token in vocab if token not in data["model"]["merges"]][40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(data))
    assert command("--distill", "--teacher=other") == 2
    assert "reads other tokens" in capsys.readouterr().err


def test_full_fine_tuning_that_does_not_fit_is_refused_with_what_it_takes(command, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(teaching, "available_memory", lambda _: 1000)
    seen = files()
    flags = [f"--model_path={INPUT}", "--save_name=full", "--samples=4", "--seq_len=32", f"--data_dir={data_dir}"]
    assert script.main(flags) == 2
    error = capsys.readouterr().err
    assert "for weights, gradients and the optimizer's moments" in error and "--use_lora" in error and files() == seen


@pytest.mark.parametrize("where", ["beside", "cached"])
def test_the_pruning_script_distills_and_is_resumed_in_the_middle_of_it(trained_dir, data_dir, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    flags = [
        f"--base_model={trained_dir}",
        f"--data_dir={data_dir}",
        "--prune_mlp",
        "--pruning_strategy=uniform",
        "--device=cpu",
    ]
    flags += [
        "--channel_importance_samples=8",
        "--calibration_seq_len=32",
        "--eval_seq_len=32",
        "--eval_samples=4",
        "--finetune",
    ]
    flags += ["--finetune_samples=12", "--finetune_seq_len=32", "--finetune_lr=5e-3", "--distill", f"--teacher_answers={where}"]
    flags += ["--finetune_dataset", "wikitext2", "self", "--dtype=float32", "--finetune_check_steps=2", "--finetune_epochs=2"]
    assert pruning.main([*flags, "--save_ckpt_log_name=whole"]) == 0
    with monkeypatch.context() as patch:
        dies_after(4, patch)
        assert pruning.main([*flags, "--save_ckpt_log_name=dead"]) == 130
    assert pruning.main([*flags, "--save_ckpt_log_name=dead", "--resume"]) == 0
    assert all(value.equal(weights("whole")[name]) for name, value in weights("dead").items())
    assert metrics("whole")["ppl"] == metrics("dead")["ppl"]
    assert metrics("whole")["training"]["curve"] == metrics("dead")["training"]["curve"]


def test_distillation_without_fine_tuning_is_refused(trained_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pruning.main([f"--base_model={trained_dir}", "--save_ckpt_log_name=x", "--distill"]) == 2
    assert "add --finetune" in capsys.readouterr().err and not list(Path().iterdir())
    flags = ["--finetune", "--distill", "--teacher=x"]
    assert pruning.main([f"--base_model={trained_dir}", "--save_ckpt_log_name=x", *flags]) == 2
    assert "--teacher is for test_finetuning.py" in capsys.readouterr().err and not list(Path().iterdir())
