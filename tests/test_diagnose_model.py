"""The diagnosis script: exit codes 0, 1 and 2, the report on paper, and ill models that must not end in a traceback."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_text, tiny_model
from safetensors.torch import load_file, save_file

import diagnose_model as script
from LLMPruner.export.hf import write_hf
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan

ROOT = Path(__file__).parent.parent
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def pruned_bytes(trained_dir, tmp_path_factory) -> bytes:
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    geometry = loaded.plan.geometry
    plan = PruningPlan.dense(geometry).with_layer(1, LayerPlan((0,), tuple(range(90))))
    apply_plan(LayerRunner.of(loaded.model), plan)
    path = tmp_path_factory.mktemp("pruned") / "m.bin"
    save_model(path, LoadedModel(loaded.model, loaded.tokenizer, plan, {"parameters": plan.total_params}))
    return path.read_bytes()


@pytest.fixture
def pruned(folder, pruned_bytes) -> Path:
    (folder / "m.bin").write_bytes(pruned_bytes)
    return Path("m.bin")


def run(capsys, *flags) -> tuple[int, str, str]:
    try:
        code = script.main([*map(str, flags), "--dtype=float32"])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    return code, output.out, output.err


def change(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor of a checkpoint, or take it out."""
    payload = torch.load(path, weights_only=True)
    payload[name] = tensor
    torch.save({key: value for key, value in payload.items() if value is not None}, path)


def test_healthy_models_exit_0_and_speak(pruned, trained_dir, capsys, monkeypatch):
    monkeypatch.setattr("LLMPruner.evaluator.health.TEXT", make_text(1, seed=7))  # the only English the tiny model knows
    for path in (pruned, trained_dir):
        code, out, err = run(capsys, f"--model_path={path}", "--test_forward")
        assert code == 0 and out.splitlines()[0] == "HEALTHY" and err == ""
        assert "forward: PPL " in out and out.count("4:1") == 4 and "generation: '" in out


def test_the_report_is_saved_as_text_or_json(pruned, capsys):
    _, out, _ = run(capsys, f"--model_path={pruned}", "--save_report=r.txt")
    assert Path("r.txt").read_text() == out
    assert run(capsys, f"--model_path={pruned}", "--save_report=r.json")[0] == 0
    saved = json.loads(Path("r.json").read_text())
    assert saved["healthy"] and saved["findings"] == [] and saved["path"] == "m.bin"
    assert saved["layers"][1] == {"query_heads": 4, "kv_heads": 1, "channels": 90}
    assert saved["parameters"] < saved["dense_parameters"]
    assert {path.name for path in Path().iterdir()} == {"m.bin", "r.txt", "r.json"}


def test_beside_the_dense_model_the_report_tells_where_the_damage_is(pruned, trained_dir, data_dir, capsys):
    flags = [f"--model_path={pruned}", f"--original_model={trained_dir}", "--save_report=r.json", "--plot=d.png"]
    code, out, err = run(capsys, *flags)
    assert code == 0 and "massive activations: layer " in out and "longest token" in out and err == ""
    assert "next step: " in out and Path("d.png").read_bytes().startswith(b"\x89PNG")
    damage = json.loads(Path("r.json").read_text())["damage"]
    assert len(damage["layers"]) == 4 and damage["kl"] > 0 and damage["layers"][0]["distance"] == 0.0
    assert "built-in" in damage["text"]
    code, out, _ = run(capsys, *flags, "--dataset=wikitext2", f"--data_dir={data_dir}", "--seq_len=32", "--samples=3")
    assert code == 0 and "on 96 tokens of wikitext2" in out
    code, out, _ = run(capsys, f"--model_path={trained_dir}", f"--original_model={trained_dir}")
    assert code == 0 and "1.0 times as long" in out and "none is false" in out and "next step: nothing" in out


def test_another_dense_model_is_refused(pruned, tokenizer, capsys):
    for name, changes in (
        ("deeper", {"num_hidden_layers": 5}),
        ("wider", {"hidden_size": 128}),
        ("richer", {"vocab_size": 301}),
    ):
        tiny_model(**changes).save_pretrained(name)
        tokenizer.save_pretrained(name)
        capsys.readouterr()  # transformers' progress bar
        code, out, err = run(capsys, f"--model_path={pruned}", f"--original_model={name}")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert f"--original_model {name} is not the dense model of m.bin" in err


def test_a_pruned_model_is_no_dense_one(pruned, trained_dir, tokenizer, capsys):
    for path in (pruned, Path("export")):
        if path.name == "export":
            write_hf(path, load_model(find_model(str(pruned), ""), dtype="float32", device="cpu"), {})
        code, out, err = run(capsys, f"--model_path={trained_dir}", f"--original_model={path}", "--save_report=r.json")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert f"--original_model {path} is pruned itself: give the dense model it came from" in err
    assert not Path("r.json").exists()


def test_what_is_written_may_lie_in_the_home_folder(pruned, trained_dir, capsys, monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = [f"--model_path={pruned}", f"--original_model={trained_dir}", "--save_report=~/r.json", "--plot=~/d.png"]
    assert run(capsys, *flags)[0] == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"r.json", "d.png"} and not Path("~").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save_report=./m.bin"], "--save_report ./m.bin is a file of --model_path"),
        (["--plot=link.png"], "--plot link.png is a file of --model_path"),
        (["--save_report=dense/config.json"], "config.json is a file of --original_model"),
        (["--save_report=dense/model.safetensors"], "model.safetensors is a file of --original_model"),
        (["--save_report=own.txt", "--dataset=own.txt"], "--save_report own.txt is a file of --dataset"),
        (["--save_report=d.png", "--plot=./d.png"], "--plot ./d.png is a file of --save_report"),
    ],
)
def test_what_is_read_is_not_written_over(pruned, trained_dir, capsys, flags, words):
    shutil.copytree(trained_dir, "dense")
    Path("own.txt").write_text(make_text(30, 0))
    Path("link.png").symlink_to("m.bin")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, out, err = run(capsys, f"--model_path={pruned}", "--original_model=dense", *flags)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (Q_PROJ, torch.full((32, 64), torch.nan), "2,048 values are NaN"),
        (Q_PROJ, torch.full((32, 64), torch.inf), "infinite"),
        (Q_PROJ, torch.full((32, 64), 1e6), "1e+06"),
        (Q_PROJ, torch.zeros(32, 64), "zero"),
        (Q_PROJ, torch.ones(24, 64), "Q:KV heads are 3:1, not 4:1"),
        (Q_PROJ, torch.ones(32, 65), "(32, 65)"),
        (Q_PROJ, torch.tensor(1.0), "has shape ()"),
        (Q_PROJ, torch.ones(0, 64), "has shape (0, 64)"),
        (Q_PROJ, None, "is missing"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(89, 64), "(89, 64)"),
    ],
)
def test_an_ill_checkpoint_exits_1_and_says_why(pruned, capsys, name, tensor, words):
    change(pruned, name, tensor)
    code, out, _ = run(capsys, f"--model_path={pruned}", "--test_forward", "--save_report=r.json")
    assert code == 1 and out.startswith("UNHEALTHY: ") and words in out and name in out
    saved = json.loads(Path("r.json").read_text())
    assert not saved["healthy"] and any(words in finding["message"] for finding in saved["findings"])


def test_an_ill_directory_exits_1(folder, trained_dir, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((trained_dir / name).read_bytes())
    tensors = load_file(trained_dir / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    code, out, _ = run(capsys, "--model_path=.")
    assert code == 1 and out.startswith("UNHEALTHY: model.norm.weight: 1 values are NaN")


def test_a_file_that_cannot_be_read_is_unhealthy(pruned, pruned_bytes, capsys):
    for size in (len(pruned_bytes) - 1, len(pruned_bytes) // 2, 100, 0):
        pruned.write_bytes(pruned_bytes[:size])
        code, out, _ = run(capsys, f"--model_path={pruned}", "--test_forward", "--save_report=r.txt")
        assert code == 1 and out.startswith("UNHEALTHY: file: m.bin ") and Path("r.txt").read_text() == out


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("write", [lambda thing, path: path.write_bytes(pickle.dumps(thing)), torch.save])
def test_a_strangers_pickle_is_never_executed(folder, capsys, write):
    write({"model": Malicious()}, Path("m.bin"))
    code, _, error = run(capsys, "--model_path=m.bin", "--test_forward")
    assert code == 2 and "never unpickled here" in error  # no illness: a file that was never ours
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model_path"),
        (["--model_path=/nowhere/m.bin"], "does not exist"),
        (["--model_path=."], "config.json"),
        (["--model_path=" + 300 * "x", "--save_report=r.txt"], "cannot be read: File name too long"),
        (["--model_path=notes.txt"], "not a model"),
        (["--model_path=m.bin", "--save_report=none/r.txt"], "--save_report"),
        (["--model_path=m.bin", "--save_report=."], "--save_report"),
        (["--model_path=m.bin", "--original_model=/nowhere/dense"], "--original_model /nowhere/dense does not exist"),
        (["--model_path=m.bin", "--plot=d.png"], "--plot belongs to the comparison with the dense model"),
        (["--model_path=m.bin", "--dataset=wikitext2"], "--dataset belongs to the comparison with the dense model"),
        (["--model_path=m.bin", "--original_model=m.bin", "--plot=d.pdf"], "--plot d.pdf must end in .png"),
        (["--model_path=m.bin", "--original_model=m.bin", "--plot=none/d.png"], "--plot none/d.png cannot be written"),
        (["--model_path=m.bin", "--original_model=m.bin", "--dataset=none"], "unknown corpus 'none'"),
        (["--model_path=m.bin", "--original_model=m.bin", "--samples=0"], "--samples must be 1 or more"),
        (
            ["--model_path=m.bin", "--original_model=m.bin", "--dataset=notes.txt", "--seq_len=300"],
            "shorter than one window of 300",
        ),
        (["--model_path=m.bin", "--unknown"], "--unknown"),
        (["--model_path=m.bin", "--test_forward", "--device=cuda:77"], "--device"),
    ],
)
def test_a_wrong_command_exits_2_in_one_sentence(pruned, capsys, flags, words):
    Path("notes.txt").write_text("no model")
    code, out, err = run(capsys, *flags)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"m.bin", "notes.txt"}


def test_wrong_commands_and_help_answer_without_torch():
    for flags, code in ((["--help"], 0), (["--model_path=/nowhere"], 2)):
        probe = f"import sys, diagnose_model as s\ntry: c = s.main({flags!r})\nexcept SystemExit as e: c = e.code\n"
        probe += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(c)"
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
