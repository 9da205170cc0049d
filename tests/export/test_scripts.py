"""Exports from the command line: on pruning, on fine-tuning, and for an existing checkpoint; and what takes them back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import diagnose_model
import evaluate_models
import llama3_unbalanced_pruning_gqa_aware as pruning
import test_finetuning as finetuning
from LLMPruner.export.__main__ import main as export
from LLMPruner.export.__main__ import precision
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model
from tests.conftest import half_pruned, random_windows

ROOT = Path(__file__).parent.parent.parent
QUICK = ["--dtype=float32"]
SMALL = ["--layer_importance_samples=4", "--channel_importance_samples=4", "--calibration_seq_len=32"]
SMALL += ["--layer_importance_seq_len=32", "--eval_seq_len=32", "--eval_samples=4", *QUICK]


@pytest.fixture
def place(trained_dir, tmp_path, monkeypatch) -> Path:
    """A working folder with `m.bin`, a pruned checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("m.bin"), half_pruned(trained_dir))
    return tmp_path


def answer(model) -> torch.Tensor:
    """Logits on fixed tokens."""
    with torch.no_grad():
        return model(input_ids=random_windows(2, 9)).logits


def loaded(path: str):
    """Our loader's model."""
    return load_model(find_model(path, "--model_path"), dtype="float32", device="cpu").model


def test_pruning_exports_all_formats_with_the_measured_ppl_on_the_card(trained_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--save_ckpt_log_name=x", "--prune_mlp", *SMALL]
    assert pruning.main([*flags, "--test_after_prune", "--export", "hf", "gguf", "padded"]) == 0
    folder = Path("prune_log/x")
    assert (folder / "model.gguf").stat().st_size > 10_000
    expected = answer(loaded("prune_log/x/pytorch_model.bin"))
    assert answer(AutoModelForCausalLM.from_pretrained(folder / "hf")).equal(expected)
    assert torch.allclose(answer(AutoModelForCausalLM.from_pretrained(folder / "padded")), expected, atol=1e-5)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"| {metrics['ppl']['pruned'][0]['ppl']:.2f} |" in (folder / "hf" / "README.md").read_text()
    assert metrics["stages"][-1]["stage"] == "export"


def test_fine_tuning_exports_what_it_trained(place, data_dir):
    flags = [
        "--model_path=m.bin",
        "--save_name=t",
        f"--data_dir={data_dir}",
        "--samples=8",
        "--epochs=1",
        "--seq_len=32",
        *QUICK,
    ]
    assert finetuning.main([*flags, *QUICK, "--lr=1e-3", "--export", "hf"]) == 0
    tuned = AutoModelForCausalLM.from_pretrained("prune_log/t/hf")
    assert answer(tuned).equal(answer(loaded("prune_log/t/pytorch_model_finetuned.bin")))
    assert not answer(tuned).equal(answer(loaded("m.bin")))


def test_an_exported_directory_is_evaluated_diagnosed_and_fine_tuned(place, data_dir, capsys):
    assert export(["m.bin", "--format", "hf", "padded", "--output", "out", *QUICK]) == 0
    data = [f"--data_dir={data_dir}", *QUICK, "--device=cpu"]
    models = ["--pruned_model=out/hf", "--original_model=m.bin", "--finetuned_model=out/padded"]
    sizes = ["--efficiency_prompt_tokens=16", "--efficiency_new_tokens=2", "--efficiency_repeats=1"]
    assert evaluate_models.main([*models, *data, "--eval_samples=4", "--save_results=r.json", "--efficiency", *sizes]) == 0
    results = json.loads(Path("r.json").read_text())
    rows = results["models"]
    assert rows["pruned"]["ppl"] == rows["original"]["ppl"]
    assert rows["pruned"]["parameters"] == rows["original"]["parameters"] < rows["finetuned"]["parameters"]
    assert results["efficiency"]["pruned"]["kv_bytes_per_token"] < results["efficiency"]["finetuned"]["kv_bytes_per_token"]
    assert "Efficiency on cpu, float32" in capsys.readouterr().out
    assert diagnose_model.main(["--model_path=out/hf", *QUICK]) == 0
    assert "HEALTHY" in capsys.readouterr().out
    tuning = ["--model_path=out/hf", "--save_name=again", "--samples=8", "--epochs=1", "--seq_len=32", "--use_lora"]
    assert finetuning.main([*tuning, *data]) == 0
    plan = find_model("prune_log/again/pytorch_model_finetuned.bin", "--model_path").plan
    assert plan == find_model("m.bin", "--model_path").plan


def test_the_card_of_an_existing_checkpoint_tells_what_its_run_measured(place):
    row = {"corpus": "ptb", "split": "test", "windows": 2, "seq_len": 8, "ppl": 7.125}
    Path("metrics.json").write_text(json.dumps({"ppl": {"pruned": [row]}}))
    assert export(["m.bin", "--output", "out", *QUICK]) == 0
    assert "| pruned | ptb | test | 2 | 8 | 7.12 |" in Path("out/hf/README.md").read_text()
    Path("metrics.json").unlink()
    assert export(["m.bin", "--output", "out", *QUICK]) == 0
    assert "Not measured by the run" in Path("out/hf/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["missing.bin", "--output=out"], "missing.bin does not exist"),
        (["m.bin", "--output=m.bin"], "is not a folder"),
        (["m.bin", "--output=m.bin/x"], "cannot be read"),
        (["m.bin", "--output="], "is not a folder"),
        (["m.bin", "--output=out", "--gguf_type=f16"], "needs gguf"),
        (["g/model.gguf", "--output=out"], "is for llama.cpp"),
        (["m.bin", "--output=out", "--format", "hf", "hf"], "named twice"),
        (["m.bin", "--output=out", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["m.bin"], "--output"),
        (["m.bin", "--output=mine"], "something else than an export"),
        (["m.bin", "--output=mine", "--format", "gguf"], "something else than an export"),
        (["m.bin", "--output=mine", "--format", "padded"], "is a link"),
        (["m.bin", "--output=ollama", "--format", "hf", "gguf"], "Modelfile was not written by an export"),
    ],
)
def test_a_wrong_export_is_one_sentence_and_changes_nothing(place, capsys, flags, words):
    assert export(["m.bin", "--output=g", "--format", "gguf", *QUICK]) == 0
    (place / "mine" / "hf").mkdir(parents=True)
    (place / "mine" / "hf" / "thesis.txt").write_text("years of work")
    (place / "mine" / "model.gguf").write_text("notes")
    (place / "mine" / "padded").symlink_to(place / "elsewhere")
    (place / "ollama").mkdir()
    (place / "ollama" / "Modelfile").write_text("FROM llama3")
    before = sorted(str(path) for path in place.rglob("*"))
    try:
        code = export([*flags, *QUICK])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert sorted(str(path) for path in place.rglob("*")) == before


def test_an_export_never_replaces_its_own_source(place, capsys):
    assert export(["m.bin", "--output", "out", *QUICK]) == 0
    before = {path.name: path.read_bytes() for path in Path("out/hf").iterdir()}
    assert export(["out/hf", "--output", "out", *QUICK]) == 2
    assert "would replace" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("out/hf").iterdir()} == before


def test_exports_of_the_scripts_never_replace_what_they_read(place, data_dir, capsys):
    assert export(["m.bin", "--output", "prune_log/t", *QUICK]) == 0
    before = {path.name: path.read_bytes() for path in Path("prune_log/t/hf").iterdir()}
    flags = ["--model_path=prune_log/t/hf", "--save_name=t", f"--data_dir={data_dir}", "--seq_len=32", *QUICK]
    assert finetuning.main([*flags, "--export", "hf"]) == 2
    assert "would replace the model that is read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("prune_log/t/hf").iterdir()} == before


def test_a_padded_export_is_not_pruned_again(trained_dir, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = [f"--data_dir={data_dir}", *SMALL]
    assert (
        pruning.main([f"--base_model={trained_dir}", "--save_ckpt_log_name=x", "--prune_mlp", *shared, "--export", "padded"])
        == 0
    )
    assert pruning.main(["--base_model=prune_log/x/padded", "--save_ckpt_log_name=y", *shared]) == 2
    assert "is pruned already" in capsys.readouterr().err


def test_the_weights_own_precision_is_kept_whatever_the_machine_likes(trained_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = half_pruned(trained_dir)
        model.model.to(dtype)
        model.model.config.dtype = dtype
        save_model(Path("m.bin"), model)
        assert export(["m.bin", "--output", "out"]) == 0
        assert AutoModelForCausalLM.from_pretrained("out/hf", dtype="auto").dtype == dtype


def test_a_dense_gguf_is_exported_in_the_precision_that_pruning_it_here_has(place, monkeypatch):
    source = SimpleNamespace(kind="gguf", config={})
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda fast=fast: fast)
        assert precision(source) == expected
    assert precision(find_model("m.bin", "x")) == "float32"


def test_help_answers_without_waiting_for_torch_and_the_import_registers():
    run = [sys.executable, "-X", "importtime", "-m", "LLMPruner.export", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {
        line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert "--gguf_type" in done.stdout and "LLMPruner" in modules
    assert not {"torch", "transformers", "numpy"} & modules
    code = (
        "import LLMPruner.export; from transformers import AutoConfig; print(AutoConfig.for_model('pruned_llama').model_type)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "pruned_llama\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dense=a.gguf"], "--pruned"),
        (["--dense=a.gguf", "--pruned=missing.gguf"], "--pruned missing.gguf cannot be read"),
        (["--dense=a.gguf", "--pruned=notes.gguf"], "--pruned notes.gguf is not a GGUF file"),
        (["--dense=a.gguf", "--pruned=."], "--pruned . cannot be read"),
        (["--dense=a.gguf", "--pruned=a.gguf"], "are the same file"),
        (["--dense=a.gguf", "--pruned=b.gguf", "--repeats=0"], "--repeats must be 1 or more"),
        (["--dense=a.gguf", "--pruned=b.gguf"], "llama-cpp-python is missing"),
    ],
)
def test_the_benchmark_of_served_models_checks_its_inputs_first(flags, words, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "notes.gguf").write_text("notes")
    run = [sys.executable, str(ROOT / "benchmarks" / "served.py"), *flags]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_activation_that_gguf_cannot_name_is_refused_before_pruning(trained_dir, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_dir, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    flags = ["--base_model=model", f"--data_dir={data_dir}", "--save_ckpt_log_name=x", *SMALL, "--export", "gguf"]
    assert pruning.main(flags) == 2
    assert "the activation 'gelu' cannot be written as GGUF" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_gguf_cannot_name_is_refused_before_pruning(trained_dir, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("LLMPruner.export.gguf.pre_tokenizer_name", refuse)
    flags = [f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--save_ckpt_log_name=x", *SMALL, "--export", "gguf"]
    assert pruning.main(flags) == 2
    assert "cannot be named" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def refuse(tokenizer) -> None:
    """Stands for a tokenizer that is unknown."""
    from LLMPruner.errors import UsageError

    raise UsageError("it cannot be named")
