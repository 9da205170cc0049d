"""The fine-tuning script: end to end on a tiny pruned model, and every wrong command it must refuse before loading anything."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import half_pruned, random_windows

import test_finetuning as script
from LLMPruner.cli import finetune_config
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model

ROOT = Path(__file__).parent.parent
INPUT = "prune_log/pruned/pytorch_model.bin"
OUTPUT = "prune_log/tuned/pytorch_model_finetuned.bin"
SMALL = ["--samples=24", "--epochs=2", "--seq_len=32", "--batch_size=4", "--grad_accum=1", "--lr=1e-2", "--eval_samples=8"]
DOCUMENTED = """
--model_path prune_log/llama3_pruned_25pct/pytorch_model.bin --save_name lora_finetune --use_lora --lora_r 8 --lora_alpha 16
--lora_target_attention --lora_target_mlp --lr 2e-4 --samples 1000 --epochs 3 --seq_len 512 --batch_size 1 --grad_accum 4
--test_before --test_after --save_model

--model_path prune_log/exp_25pct/pytorch_model.bin --save_name exp_25pct_lora --use_lora --lora_target_attention
--lora_target_mlp --lr 2e-4 --samples 1000 --epochs 3 --seq_len 512 --save_model

--model_path prune_log/debug_test/pytorch_model.bin --save_name debug_finetune --use_lora --lora_target_attention
--lora_target_mlp --samples 50 --epochs 1 --seq_len 128

--model_path prune_log/production/pytorch_model.bin --save_name production_lora --use_lora --lora_r 8 --lora_alpha 16
--lora_target_attention --lora_target_mlp --lr 2e-4 --samples 1000 --epochs 3 --seq_len 512 --batch_size 1 --grad_accum 4
--max_grad_norm 1.0 --warmup_steps 100 --save_model
""".strip().split("\n\n")


@pytest.fixture(scope="session")
def damaged(trained_dir):
    return half_pruned(trained_dir)


@pytest.fixture
def command(damaged, data_dir, tmp_path, monkeypatch):
    """Runs the script in a folder that holds INPUT and nothing else; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    Path(INPUT).parent.mkdir(parents=True)
    save_model(Path(INPUT), damaged)

    def run(*flags, name="tuned", model=INPUT):
        shared = [f"--model_path={model}", f"--save_name={name}", f"--data_dir={data_dir}", "--dtype=float32", "--device=cpu"]
        try:
            return script.main([*shared, *SMALL, *map(str, flags)])
        except SystemExit as stop:  # argparse's own way out
            return stop.code

    return run


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def reload(path: str):
    return load_model(find_model(path, "--model_path"), dtype="float32", device="cpu")


@pytest.mark.parametrize("text", DOCUMENTED)
def test_the_documents_commands_mean_what_they_say(text):
    args = script.build_parser().parse_args(shlex.split(text))
    config = finetune_config(args, "", "lora" if args.use_lora else "full")
    assert config.method == "lora" and config.learning_rate == 2e-4 and args.save_model is True
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0.05)
    assert config.lora.target_attention and config.lora.target_mlp
    assert (config.batch_size, config.grad_accum, config.max_grad_norm, config.warmup(10_000)) == (1, 4, 1.0, 100)
    short = "debug" in text
    assert (config.samples, config.epochs, config.seq_len) == ((50, 1, 128) if short else (1000, 3, 512))
    assert args.test_before == args.test_after == ("--test_before" in text)


def test_lora_end_to_end(command):
    before = Path(INPUT).read_bytes()
    flags = ["--use_lora", "--lora_target_attention", "--lora_target_mlp", "--test_before", "--test_after"]
    assert command(*flags, "--eval_datasets", "wikitext2", "ptb") == 0
    assert Path(INPUT).read_bytes() == before
    folder = Path("prune_log/tuned")
    (stamp,) = [path for path in folder.iterdir() if path.is_dir() and path.name != "adapter"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "adapter",
            "description.txt",
            "journal_finetune.json",
            "metrics.json",
            "pytorch_model_finetuned.bin",
            "training.png",
            stamp.name,
        ]
    )
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and os.access(stamp / "train.sh", os.X_OK)

    metrics = json.loads((folder / "metrics.json").read_text())
    for was, now in zip(metrics["ppl"]["before"], metrics["ppl"]["after"], strict=True):
        assert now["ppl"] < 0.9 * was["ppl"] and (was["split"], was["seq_len"], was["windows"]) == ("test", 32, 8)
    assert [row["corpus"] for row in metrics["ppl"]["after"]] == ["wikitext2", "ptb"]
    evaluations = ["evaluate before fine-tuning", "evaluate after fine-tuning"]
    assert [row["stage"] for row in metrics["stages"]] == ["load", evaluations[0], "train", "save", evaluations[1]]
    assert metrics["training"]["steps"] == 12 and metrics["training"]["loss_last"] < metrics["training"]["loss_first"]
    log = (stamp / "training.log").read_text()
    was, now = (metrics["ppl"][when][0]["ppl"] for when in ("before", "after"))
    assert f"PPL wikitext2 test: {was:.4f} -> {now:.4f}" in log and "step 12 of 12  loss" in log
    assert "seq_len: 32" in (folder / "description.txt").read_text()

    loaded, pruned = reload(OUTPUT), reload(INPUT)
    assert loaded.plan == pruned.plan and loaded.provenance["finetune"]["base_checkpoint"] == INPUT
    assert pruned.provenance.items() <= loaded.provenance.items()


def test_full_fine_tuning_is_the_default_and_works(command):
    assert command("--lr=2e-3", "--test_before", "--test_after") == 0
    ppl = json.loads(Path("prune_log/tuned/metrics.json").read_text())["ppl"]
    assert ppl["after"][0]["ppl"] < 0.9 * ppl["before"][0]["ppl"]
    assert reload(OUTPUT).provenance["finetune"]["method"] == "full"
    assert not Path("prune_log/tuned/adapter").exists()


def test_what_is_saved_is_what_was_trained(command, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "LLMPruner.model.load.save_model", lambda path, loaded: (kept.append(loaded.model), save_model(path, loaded))
    )
    assert command("--use_lora") == 0
    rows = random_windows(2, 16)
    with torch.no_grad():
        assert reload(OUTPUT).model(input_ids=rows).logits.equal(kept[0](input_ids=rows).logits)


def test_no_save_model_trains_and_writes_no_weights(command):
    assert command("--use_lora", "--no_save_model", "--test_after") == 0
    assert not Path(OUTPUT).exists() and not Path("prune_log/tuned/adapter").exists()
    assert "before" not in json.loads(Path("prune_log/tuned/metrics.json").read_text())["ppl"]


def test_a_dense_hugging_face_directory_can_be_fine_tuned_too(command, trained_dir):
    assert command("--use_lora", model=trained_dir) == 0
    assert reload(OUTPUT).plan.is_dense


def test_the_name_of_the_pruning_run_is_fine_and_loses_nothing_of_it(command):
    metrics = Path("prune_log/pruned/metrics.json")
    metrics.write_text("of the pruning")
    before = Path(INPUT).read_bytes()
    assert command("--use_lora", name="pruned") == 0
    assert Path(INPUT).read_bytes() == before and metrics.read_text() == "of the pruning"
    assert json.loads(Path("prune_log/pruned/metrics_finetune.json").read_text())["training"]["steps"] == 12
    assert reload("prune_log/pruned/pytorch_model_finetuned.bin").plan == reload(INPUT).plan


def test_a_second_round_needs_another_name(command, capsys):
    assert command("--use_lora") == 0
    before, seen = Path(OUTPUT).read_bytes(), files()
    assert command("--use_lora", model=OUTPUT) == 2
    error = capsys.readouterr().err
    assert f"--save_name tuned would overwrite {OUTPUT}" in error and error.count("\n") == 1
    assert Path(OUTPUT).read_bytes() == before and files() == seen
    assert command("--use_lora", model=OUTPUT, name="again") == 0


@pytest.mark.parametrize("flags", [["--use_lora"], []], ids=["lora", "full"])
def test_a_loss_that_is_not_a_number_exits_1_with_advice_and_no_model(command, capsys, flags):
    broken = reload(INPUT)
    broken.model.model.norm.weight.data[0] = math.nan
    save_model(Path("broken.bin"), broken)
    before = Path("broken.bin").read_bytes()
    assert command(*flags, model="broken.bin") == 1
    error = capsys.readouterr().err
    assert "loss became nan" in error and "--use_lora --lora_target_attention --lora_target_mlp --lr 2e-4" in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert Path("broken.bin").read_bytes() == before
    assert not [path for path in files() if "finetuned" in path or "adapter" in path]


def test_a_rate_that_blows_up_exits_1(command, capsys):
    assert command("--lr=1e30", "--max_grad_norm=0", "--warmup_steps=0") == 1
    assert "became" in capsys.readouterr().err and not Path(OUTPUT).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save_name=a/b"], "--save_name"),
        (["--save_name=.."], "--save_name"),
        (["--save_name="], "--save_name"),
        (["--model_path=/nowhere/model.bin"], "does not exist"),
        (["--model_path=prune_log/pruned"], "config.json"),
        (["--seq_len=257"], "--seq_len 257"),
        (["--seq_len=1"], "--seq_len must"),
        (["--samples=0"], "--samples"),
        (["--epochs=0"], "--epochs"),
        (["--batch_size=0"], "--batch_size"),
        (["--grad_accum=-1"], "--grad_accum"),
        (["--warmup_steps=-1"], "--warmup_steps"),
        (["--max_grad_norm=-1"], "--max_grad_norm"),
        (["--weight_decay=nan"], "--weight_decay"),
        (["--lr=0"], "--lr"),
        (["--lr=inf"], "--lr"),
        (["--lr=fast"], "--lr"),
        (["--use_lora", "--lora_r=0"], "--lora_r"),
        (["--use_lora", "--lora_dropout=1"], "--lora_dropout"),
        (["--use_lora", "--no_lora_target_attention", "--no_lora_target_mlp"], "--lora_target"),
        (["--dataset=nothere"], "unknown corpus"),
        (["--dataset", "wikitext2:0.5", "nothere:0.5"], "unknown corpus"),
        (["--dataset", "wikitext2:-1"], "--dataset wikitext2:-1"),
        (["--dataset", "wikitext2", "self", "--samples=1"], "--samples 1 leaves self no window"),
        (["--test_after", "--eval_datasets", "alpaca"], "holds chats"),
        (["--test_after", "--eval_datasets", "nothere"], "unknown corpus"),
        (["--test_before", "--eval_samples=-1"], "--eval_samples"),
        (["--data_dir=nothere"], "--data_dir"),
        (["--device=cuda:77"], "--device"),
        (["--unknown_flag"], "--unknown_flag"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_changes_nothing(command, capsys, flags, words):
    before = files()
    assert command(*flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert files() == before


@pytest.mark.parametrize("flag", ["--model_path", "--save_name"])
def test_the_two_paths_are_required(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([other for other in ("--model_path=m", "--save_name=n") if not other.startswith(flag)])
    assert flag in capsys.readouterr().err


def test_a_corpus_with_too_few_tokens_is_refused_before_weights_are_read(command, capsys, monkeypatch):
    Path("few.txt").write_text("The cat chases the mouse quickly .")  # bytes enough, tokens not
    before = files()
    monkeypatch.setattr("LLMPruner.stages.recover.load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert command("--dataset=few.txt") == 2
    assert "shorter than one window" in capsys.readouterr().err and files() == before


def test_a_full_disk_is_noticed_before_anything_is_written(command, capsys, monkeypatch):
    before = files()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert command() == 2
    assert "free" in capsys.readouterr().err and files() == before


@pytest.mark.parametrize("place", ["transformers.Trainer.train", "torch.save"])
def test_an_interrupt_exits_130_and_leaves_no_half_written_model(command, monkeypatch, place):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = Path(INPUT).read_bytes()
    monkeypatch.setattr(place, interrupted)
    assert command("--use_lora") == 130
    assert not [path for path in files() if "finetuned" in path or path.endswith(".tmp")]
    assert Path(INPUT).read_bytes() == before


def test_help_and_errors_answer_before_torch_is_imported(command):
    wrong = [f"--model_path={Path(INPUT).resolve()}", "--save_name=x"]
    for flags, code in ((["--help"], 0), ([*wrong, "--seq_len=999"], 2), ([*wrong, "--lr=-1"], 2)):
        probe = f"import sys, test_finetuning as s\ntry: c = s.main({flags!r})\nexcept SystemExit as e: c = e.code\n"
        probe += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(c)"
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def test_it_runs_as_a_script_with_nothing_on_stderr(command, data_dir):
    flags = [f"--model_path={INPUT}", "--save_name=tuned", f"--data_dir={data_dir}", "--use_lora", "--device=cpu", *SMALL]
    done = subprocess.run([sys.executable, ROOT / "test_finetuning.py", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 12 of 12" in done.stdout and "{'" not in done.stdout  # no dictionary of the Trainer's
