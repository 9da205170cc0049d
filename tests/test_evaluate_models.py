"""The evaluation script: the same windows for all models, what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_text, tiny_model
from transformers import LlamaForCausalLM

import evaluate_models as script
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan
from tests.evaluator.test_compare import save_with_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def pruned_bin(trained_dir, tmp_path_factory) -> Path:
    loaded = load_model(find_model(str(trained_dir), "--original_model"), dtype="float32", device="cpu")
    plan = PruningPlan.dense(loaded.plan.geometry).with_layer(1, LayerPlan((0,), tuple(range(64))))
    apply_plan(LayerRunner.of(loaded.model), plan)
    path = tmp_path_factory.mktemp("pruned") / "pytorch_model.bin"
    save_model(path, LoadedModel(loaded.model, loaded.tokenizer, plan, {"parameters": plan.total_params}))
    return path


@pytest.fixture
def command(data_dir, tmp_path, monkeypatch):
    """Runs the script in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        try:
            return script.main([f"--data_dir={data_dir}", "--dtype=float32", "--device=cpu", *map(str, flags)])
        except SystemExit as stop:  # argparse's own way out
            return stop.code

    return run


def results(path: str = "r.json") -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_ppl_is_what_transformers_own_loss_says(command, trained_dir, tokenizer, data_dir):
    assert command(f"--original_model={trained_dir}", "--seq_len=64", "--save_results=r.json") == 0
    rows = (data_dir / "wikitext-2-raw" / "test.txt").read_text().split("\n")
    ids = torch.tensor(tokenizer("\n\n".join(row for row in rows if row)).input_ids)
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = LlamaForCausalLM.from_pretrained(trained_dir, dtype=torch.float32)
    with torch.no_grad():  # equally long windows: the mean of their mean losses is the mean over all tokens
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    measured = results()["models"]["original"]["ppl"]["wikitext2"]
    assert measured["ppl"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert measured["windows"] == len(windows) and measured["tokens"] == windows.numel() - len(windows)


def test_three_models_give_the_table_and_the_json(command, trained_dir, pruned_bin, capsys):
    flags = [f"--original_model={trained_dir}", f"--pruned_model={pruned_bin}", f"--finetuned_model={pruned_bin}"]
    assert command(*flags, "--eval_datasets", "wikitext2", "ptb", "--eval_samples=5", "--save_results=r.json") == 0
    table = capsys.readouterr().out.split("=" * 80 + "\nPPL 对比结果\n")[1]
    assert table.count("数据集: ") == 2 and table.count("基准") == 2 and table.count("+0.0% (vs剪枝)") == 2
    saved = results()
    assert list(saved["models"]) == ["original", "pruned", "finetuned"]
    assert (saved["seq_len"], saved["dtype"], saved["device"]) == (128, "float32", "cpu")
    assert saved["windows"] == {"wikitext2": 5, "ptb": 5}
    assert saved["versions"].keys() == {"LLMPruner", "python", "torch", "transformers"} and saved["date"][:2] == "20"
    original, pruned = saved["models"]["original"], saved["models"]["pruned"]
    assert original["parameters"] > pruned["parameters"] == find_model(str(pruned_bin), "").plan.total_params
    assert pruned["path"] == str(pruned_bin) and pruned["ppl"]["ptb"]["split"] == "test"
    for corpus in ("wikitext2", "ptb"):
        assert f"{pruned['ppl'][corpus]['ppl']:.2f}" in table
        assert (
            original["ppl"][corpus]["ppl"] < pruned["ppl"][corpus]["ppl"] == saved["models"]["finetuned"]["ppl"][corpus]["ppl"]
        )
    assert [path.name for path in Path().iterdir()] == ["r.json"]  # no prune_log, no leftovers


def test_one_model_is_enough_and_the_table_speaks_english(command, pruned_bin, capsys):
    assert command(f"--pruned_model={pruned_bin}", "--eval_samples=2", "--table_lang=en") == 0
    out = capsys.readouterr().out
    assert "PPL comparison" in out and out.count("baseline") == 1 and "PPL pruned on wikitext2" in out
    assert list(Path().iterdir()) == []


def test_a_model_that_is_broken_shows_as_nan_and_null(command, trained_dir, tokenizer, capsys):
    model = LlamaForCausalLM.from_pretrained(trained_dir)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained("broken")
    tokenizer.save_pretrained("broken")
    flags = [f"--original_model={trained_dir}", "--pruned_model=broken", "--eval_samples=2", "--save_results=r.json"]
    assert command(*flags) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("剪枝后模型"))
    assert [cell.strip() for cell in row.split("|")][1::2] == ["nan", "-"]
    assert results()["models"]["pruned"]["ppl"]["wikitext2"]["ppl"] is None


@pytest.mark.parametrize(("vocab", "text"), [(300, "zebra zebra xylophone " * 99 + make_text(9, 9)), (290, make_text(200, 0))])
def test_another_tokenizer_is_refused_before_weights_are_read(command, trained_dir, capsys, monkeypatch, vocab, text):
    save_with_tokenizer("other", vocab, text)
    capsys.readouterr()  # transformers' progress bar
    monkeypatch.setattr("LLMPruner.model.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert command(f"--original_model={trained_dir}", "--pruned_model=other", "--save_results=r.json") == 2
    error = capsys.readouterr().err
    assert "--pruned_model" in error and "compared" in error and error.count("\n") == 1
    assert not Path("r.json").exists()


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(command, tokenizer, capsys):
    tiny_model(vocab_size=100).save_pretrained("small")
    tokenizer.save_pretrained("small")
    assert command("--original_model=small") == 2
    assert "embeds 100 tokens" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("write", [lambda thing, path: path.write_bytes(pickle.dumps(thing)), torch.save])
def test_a_strangers_pickle_is_never_executed(command, capsys, write):
    write({"model": Malicious()}, Path("m.bin"))
    assert command("--pruned_model=m.bin") == 2
    error = capsys.readouterr().err
    assert "never unpickled here" in error and error.count("\n") == 1 and not Path("executed").exists()


def test_a_truncated_checkpoint_is_refused(command, pruned_bin, capsys):
    Path("m.bin").write_bytes(pruned_bin.read_bytes()[:-200])
    assert command("--pruned_model=m.bin") == 2
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--original_model"),
        (["--original_model=/nowhere/model"], "does not exist"),
        (["--original_model={model}", "--pruned_model=nothere.bin"], "--pruned_model nothere.bin does not exist"),
        (["--original_model=."], "config.json"),
        (["--original_model={model}", "--seq_len=257"], "--seq_len 257"),
        (["--original_model={model}", "--seq_len=1"], "--seq_len must"),
        (["--original_model={model}", "--eval_samples=-1"], "--eval_samples"),
        (["--original_model={model}", "--eval_datasets", "nothere"], "unknown corpus"),
        (["--original_model={model}", "--data_dir=nothere"], "--data_dir"),
        (["--original_model={model}", "--save_results=none/r.json"], "--save_results"),
        (["--original_model={model}", "--save_results=."], "--save_results"),
        (["--original_model={model}", "--table_lang=fr"], "--table_lang"),
        (["--original_model={model}", "--device=cuda:77"], "--device"),
        (["--original_model={model}", "--unknown"], "--unknown"),
    ],
)
def test_a_wrong_command_is_one_sentence_exit_2_and_changes_nothing(command, trained_dir, capsys, flags, words):
    assert command(*[flag.format(model=trained_dir) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(Path().iterdir()) == []


def test_wrong_commands_and_help_answer_without_torch(trained_dir):
    for flags, code in ((["--help"], 0), ([], 2), ([f"--original_model={trained_dir}", "--seq_len=999"], 2)):
        probe = f"import sys, evaluate_models as s\ntry: c = s.main({flags!r})\nexcept SystemExit as e: c = e.code\n"
        probe += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(c)"
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def test_any_models_give_the_general_table_and_a_pipe_reads_nothing_else(command, trained_dir, pruned_bin, capsys):
    Path("x=y").symlink_to(pruned_bin.parent)
    flags = ["--models", f"dense={trained_dir}", f"half={pruned_bin}", "--eval_samples=3"]
    assert command(*flags, "--models", f"third=x=y/{pruned_bin.name}", "--table_lang=en") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[-5:]]
    assert "PPL dense on wikitext2" in out and rows[0] == ["Model", "Parameters", "wikitext2", "change"]
    assert [row[0] for row in rows[2:]] == ["dense", "half", "third"] and rows[3][1:] == rows[4][1:]
    Path("x=y").unlink()
    assert command(*flags, "--format=csv", "--save_results=r.json") == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(printed.out.splitlines()))
    assert [row["model"] for row in rows] == ["dense", "half"] and "PPL half on wikitext2" in printed.err
    saved = results()
    for row in rows:
        assert float(row["ppl wikitext2"]) == saved["models"][row["model"]]["ppl"]["wikitext2"]["ppl"]
    assert command(*flags, "--format=json", "--baseline=half") == 0
    assert [row["baseline"] for row in json.loads(capsys.readouterr().out)] == [False, True]


def test_the_documents_table_stays_where_the_three_roles_are_all(command, trained_dir, pruned_bin, capsys):
    flags = [f"--original_model={trained_dir}", "--models", f"pruned={pruned_bin}", "--eval_samples=2"]
    assert command(*flags) == 0
    out = capsys.readouterr().out
    assert out.split("=" * 80 + "\nPPL 对比结果\n")[1].endswith("=" * 80 + "\n") and "剪枝后模型" in out


def test_local_files_and_strides_are_measured_of_any_models(command, trained_dir, pruned_bin, data_dir, tokenizer):
    file = data_dir / "ptb" / "test.txt"
    flags = ["--models", f"a={trained_dir}", f"b={pruned_bin}", "--eval_datasets", file, "--seq_len=64", "--stride=16"]
    assert command(*flags, "--save_results=r.json", "--plot=p.svg") == 0
    saved = results()
    measured = saved["models"]["b"]["ppl"][str(file)]
    text = "\n\n".join(row for row in file.read_text().split("\n") if row)
    assert (saved["stride"], measured["stride"]) == (16, 16) and measured["tokens"] == len(tokenizer(text).input_ids) - 1
    assert "<svg" in Path("p.svg").read_text()


def test_the_documents_loop_runs_as_written_and_cheaply_again(command, trained_dir, pruned_bin, monkeypatch, tmp_path):
    """README's "批量评估多个实验": three experiments, one results file each."""
    for ratio in (15, 25, 35):
        folder = Path("prune_log", f"exp_{ratio}pct")
        folder.mkdir(parents=True)
        (folder / "pytorch_model_finetuned.bin").symlink_to(pruned_bin)
    script.build_parser().parse_args(["--finetuned_model", "x", "--seq_len", "512", "--save_results", "results_15pct.json"])

    def loop(*more: str) -> None:
        for ratio in (15, 25, 35):
            model = f"prune_log/exp_{ratio}pct/pytorch_model_finetuned.bin"
            flags = ["--finetuned_model", model, "--seq_len", "128", "--save_results", f"results_{ratio}pct.json"]
            assert command(*flags, "--eval_samples=2", *more) == 0

    loop()
    before = [results(f"results_{ratio}pct.json")["models"]["finetuned"]["ppl"] for ratio in (15, 25, 35)]
    monkeypatch.setattr("LLMPruner.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    loop("--resume")
    assert [results(f"results_{ratio}pct.json")["models"]["finetuned"]["ppl"] for ratio in (15, 25, 35)] == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--save_results=./m.bin"], "--save_results m.bin is a file of --pruned_model"),
        (["--save_results=link.json"], "--save_results link.json is a file of --pruned_model"),
        (["--save_results=dense/config.json"], "is a file of --original_model"),
        (["--save_results=dense/model.safetensors"], "is a file of --original_model"),
        (["--save_results=own.txt", "--eval_datasets", "wikitext2", "own.txt"], "is a file of --eval_datasets"),
        (["--save_results={data}/wikitext-2-raw/test.txt"], "test.txt is a file of --eval_datasets"),
        (["--save_results=g.yaml", "--tasks", "g.yaml"], "is a file of --tasks"),
        (["--save_results=m.gguf", "--engine=llama.cpp", "--engine_exports", "pruned=m.gguf"], "is a file of --engine_exports"),
        (["--save_results=p.svg", "--plot=./p.svg"], "--plot p.svg is a file of --save_results"),
        (["--plot=p.png"], "--plot p.png is a file of --pruned_model"),
    ],
)
def test_what_is_read_is_not_written_over(command, trained_dir, pruned_bin, data_dir, capsys, monkeypatch, flags, words):
    monkeypatch.setattr("LLMPruner.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    shutil.copytree(trained_dir, "dense")
    shutil.copy(pruned_bin, "m.bin")
    for link in ("link.json", "p.png"):
        Path(link).symlink_to("m.bin")
    for name in ("own.txt", "g.yaml", "m.gguf"):
        Path(name).write_text(make_text(30, 0))
    text = (data_dir / "wikitext-2-raw" / "test.txt").read_text()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert command("--original_model=dense", "--pruned_model=m.bin", *(flag.format(data=data_dir) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert (data_dir / "wikitext-2-raw" / "test.txt").read_text() == text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "boolq"], "pip install lm_eval"),
        (["--limit=5"], "--limit needs --tasks"),
        (["--no_ppl"], "nothing to measure"),
        (["--resume"], "--save_results"),
        (["--stride=129"], "--stride"),
        (["--baseline=x"], "--baseline x"),
        (["--plot=p.gif"], "--plot"),
        (["--plot=p.png", "--no_ppl", "--generate=Why"], "--plot"),
        (["--models", "original=x"], "two models are named original"),
        (["--models", "x"], "NAME=PATH"),
        (["--format=html"], "--format"),
    ],
)
def test_what_is_new_is_refused_like_the_rest(command, trained_dir, capsys, monkeypatch, flags, words):
    find = importlib.util.find_spec  # wherever these tests run, without lm_eval
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert command(f"--original_model={trained_dir}", *flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and list(Path().iterdir()) == []
