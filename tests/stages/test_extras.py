"""What models say, from the load that they are measured in, and their speed in an engine: printed, kept, and refused early."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import half_pruned

import evaluate_models as script
from LLMPruner.evaluator.generate import generate
from LLMPruner.export.gguf import write_gguf
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model
from tests.evaluator.test_engines import engine  # noqa: F401 (a fixture)

PROMPT = "The cat chases"


@pytest.fixture(scope="module")
def pruned(trained_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("said") / "pytorch_model.bin"
    save_model(path, half_pruned(trained_dir))
    return path


@pytest.fixture
def command(data_dir, tmp_path, monkeypatch):
    """Runs the script in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    flags = [f"--data_dir={data_dir}", "--dtype=float32", "--device=cpu", "--seq_len=64", "--eval_samples=2"]

    def run(*more):
        try:
            return script.main([*flags, *map(str, more)])
        except SystemExit as stop:  # argparse's own way out
            return stop.code

    return run


@pytest.fixture
def loads(monkeypatch) -> list[Path]:
    """The models whose weights are read, as they come."""
    seen = []
    monkeypatch.setattr("LLMPruner.model.load.load_model", lambda s, **kw: seen.append(s.path) or load_model(s, **kw))
    return seen


def saved() -> dict:
    return json.loads(Path("r.json").read_text(encoding="utf-8"))


def told(path: Path, prompt: str = PROMPT, tokens: int = 12) -> dict:
    """What the model says, loaded by itself."""
    return generate(load_model(find_model(str(path), ""), dtype="float32", device="cpu"), prompt, new_tokens=tokens).as_dict()


def test_every_model_answers_in_the_load_that_it_is_measured_in(command, trained_dir, pruned, capsys, loads):
    flags = [f"--original_model={trained_dir}", f"--pruned_model={pruned}", "--save_results=r.json"]
    assert command(*flags, "--generate", PROMPT, "--generate_tokens=12") == 0
    assert loads == [trained_dir, pruned]
    answers = {"original": told(trained_dir), "pruned": told(pruned)}
    assert answers["original"]["text"] != answers["pruned"]["text"] and answers["original"]["tokens"] == 12
    assert saved()["generations"] == {"prompt": PROMPT, "tokens": 12, "models": answers}
    table, text = capsys.readouterr().out.split("=" * 80 + "\n\nAnswers to: " + PROMPT + "\n")
    assert "PPL 对比结果" in table and text.split()[:3] == ["original", "|", "pruned"]
    assert answers["original"]["text"].split()[0] in text and "12 tokens, cut off" in text


def test_a_pipe_reads_the_table_only(command, trained_dir, capsys):
    assert command(f"--original_model={trained_dir}", "--generate", PROMPT, "--format=csv") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("model,") and len(printed.out.splitlines()) == 2
    assert f"Answers to: {PROMPT}\n" in printed.err


def test_what_was_said_before_is_not_asked_again(command, trained_dir, pruned, capsys, loads):
    models = ["--models", f"dense={trained_dir}", f"half={pruned}", "--save_results=r.json", "--resume"]
    asked = [*models, "--generate", PROMPT, "--generate_tokens=12"]
    assert command(*models) == 0 and "generations" not in saved()
    del loads[:]
    assert command(*asked) == 0 and loads == [trained_dir, pruned], "all figures are there, the answers are not"
    first, text = saved()["generations"], capsys.readouterr().out.split("Answers to")[1]
    del loads[:]
    assert command(*asked) == 0 and loads == []
    assert saved()["generations"] == first and capsys.readouterr().out.split("Answers to")[1] == text
    again = load_model(find_model(str(trained_dir), ""), dtype="float32", device="cpu")
    save_model(pruned.parent / "other.bin", again)
    models[2] = asked[2] = f"half={pruned.parent / 'other.bin'}"
    assert command(*asked) == 0 and loads == [pruned.parent / "other.bin"], "another model has that name now"
    answers = saved()["generations"]["models"]
    assert answers["half"] == answers["dense"] == first["models"]["dense"]
    del loads[:]
    assert command(*models, "--generate", "A dog", "--generate_tokens=12", "--no_ppl") == 0
    assert len(loads) == 2 and saved()["generations"]["models"]["dense"] == told(trained_dir, "A dog")
    del loads[:]
    assert command(*asked) == 0 and loads == [], "the file keeps what was said to other prompts"
    assert saved()["generations"]["models"] == answers


def test_an_engine_times_the_exports_after_all_else(command, trained_dir, pruned, tmp_path, capsys, engine, monkeypatch):  # noqa: F811
    files = [tmp_path / "wide.gguf", tmp_path / "half.gguf"]
    for path, model in zip(files, (trained_dir, pruned), strict=True):
        write_gguf(path, load_model(find_model(str(model), ""), dtype="float32", device="cpu"), "f32")
    flags = ["--models", f"wide={files[0]}", f"half={pruned}", "--baseline=half", "--save_results=r.json"]
    flags += ["--engine_exports", f"half={files[1]}"]  # pruned GGUFs are llama.cpp's alone
    flags += ["--efficiency_prompt_tokens=8", "--efficiency_new_tokens=4", "--efficiency_repeats=2"]
    flags += ["--engine=llama.cpp", f"--engine_python={engine.python}", "--engine_threads=1"]
    with monkeypatch.context() as patch:
        patch.setattr("LLMPruner.stages.evaluate.time.perf_counter", itertools.count(0, 9).__next__)
        assert command(*flags, "--no_ppl", "--table_lang=en") == 0
    assert {record["seconds"] for record in saved()["records"]} == {9 / 2}, "each model's are its share"
    out, sizes = capsys.readouterr().out, [file.stat().st_size for file in files]
    assert "\nSpeed in llama.cpp (llama-cpp-python 7.5): medians of 2 interleaved repeats, ratios to half\n" in out
    assert "before" not in out
    rates = {"wide": pytest.approx(1 / sizes[0]), "half": pytest.approx(1 / sizes[1])}
    found = saved()["engine"]
    assert {name: speed["decode"] for name, speed in found["speeds"].items()} == rates and list(found["speeds"])[0] == "half"
    assert (found["version"], found["prompt_tokens"], found["new_tokens"], found["repeats"]) == ("7.5", 8, 4, 2)
    assert command(*flags, "--resume", "--format=csv") == 0, "with PPL, timed anew"
    printed = capsys.readouterr()
    assert "Speed in llama.cpp" in printed.err and printed.out.startswith("model,") and "decode" not in printed.out
    assert command(*flags[:5], "--resume") == 0  # without the engine
    kept = [record for record in saved()["records"] if record["kind"] == "engine"]
    assert "engine" not in saved() and len(kept) == 4 and kept[1]["settings"]["version"] == "7.5"
    assert [record["export"] for record in kept[1:3]] == [str(file) for file in files] and kept[2]["path"] == str(pruned)
    assert [(r["model"], r["metric"]) for r in kept] == [(m, p) for m in ("wide", "half") for p in ("prefill", "decode")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--generate="], "--generate needs a prompt"),
        (["--generate", " \n"], "--generate needs a prompt"),
        (["--generate", "caf\udce9"], "UTF-8"),
        (["--generate=x", "--generate_tokens=0"], "--generate_tokens must be 1"),
        (["--generate=x", "--generate_tokens=256"], "257 is longer than the model's 256 positions"),
        (["--generate_tokens=5"], "--generate_tokens needs --generate"),
        (["--generate=x", "--stream=on"], "--generate measures models in memory: run it without --stream on"),
        (["--generate", "cat " * 250], "64 new ones are more than 256 positions"),
        (["--engine_threads=2"], "needs --engine"),
        (["--engine_exports", "original=m.gguf"], "--engine_exports needs --engine"),
        (
            ["--engine=vllm", "--efficiency_prompt_tokens=9", "--engine_exports", "pruned=x"],
            "each NAME of original; got 'pruned=x'",
        ),
        (["--engine=tgi"], "--engine"),
        (["--engine=llama.cpp", "--efficiency_prompt_tokens=9"], "--engine llama.cpp times exports, and original is"),
        (["--engine=vllm", "--efficiency_prompt_tokens=250"], "together 282 is longer"),
        (["--engine=vllm", "--efficiency_prompt_tokens=9", "--engine_python=nowhere"], "--engine_python nowhere is no program"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(command, trained_dir, capsys, loads, flags, words):
    assert command(f"--original_model={trained_dir}", "--save_results=r.json", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("error: ") and not loads and list(Path().iterdir()) == []


def test_several_processes_are_refused(command, trained_dir, capsys, monkeypatch):
    monkeypatch.setattr("LLMPruner.parallel.count", lambda: 2)
    for flags in (["--generate=x"], ["--engine=vllm"]):
        assert command(f"--original_model={trained_dir}", *flags) == 2
        assert f"{flags[0].partition('=')[0]} measures one process" in capsys.readouterr().err
