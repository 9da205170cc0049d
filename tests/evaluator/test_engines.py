"""Exports are timed in a process of the engine's own Python, in turns; what cannot be is refused in one sentence.

The engine here is a module that counts, below a Python of its own; real ones run in tests/consumers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from LLMPruner.config import EfficiencyConfig
from LLMPruner.errors import RunError, UsageError
from LLMPruner.evaluator import engines
from LLMPruner.evaluator.engine_timer import rates
from LLMPruner.evaluator.engines import (
    EXPORT_FOLDER,
    EngineConfig,
    EngineSpeed,
    EngineTimes,
    check_engine,
    engine_table,
    time_engine,
)

TIMES = EfficiencyConfig(prompt_tokens=8, new_tokens=4, repeats=2)
FAKE = '''
"""A clock that the engine itself moves: a token of a model takes as many seconds as its file has bytes."""
import os, pathlib, time
__version__ = "7.5"
now = [0.0]
time.perf_counter = lambda: now[0]
class Llama:
    def __init__(self, path, **options):
        self.size, self.metadata = os.path.getsize(path), {"llama.context_length": "64"}
        self.log = pathlib.Path(path).parent / "log"
        if b"broken" in pathlib.Path(path).read_bytes():
            raise ValueError("no such tensor")
        if b"crash" in pathlib.Path(path).read_bytes():
            raise SystemError("segmentation\\nfault")
    def n_vocab(self): return 50
    def reset(self): pass
    def eval(self, tokens):
        now[0] += self.size * len(tokens)
        with self.log.open("a") as log: log.write(f"{self.size}:{len(tokens)} ")
'''


@pytest.fixture
def engine(tmp_path) -> EngineConfig:
    """The fake llama.cpp, in a Python that alone has it; engines print what they like."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "llama_cpp.py").write_text(FAKE + "print('noise')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return EngineConfig("llama.cpp", str(python))


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    found = {}
    for name, size in (("dense", 4), ("pruned", 3)):
        found[name] = tmp_path / f"{name}.gguf"
        found[name].write_bytes(b"G" * size)
    return found


def test_models_take_turns_and_medians_are_compared(engine, models):
    times = time_engine(models, engine, TIMES)
    assert times.speeds == {"dense": EngineSpeed(1 / 4, 1 / 4), "pruned": EngineSpeed(1 / 3, 1 / 3)}
    assert (times.engine, times.version, times.prompt_tokens) == ("llama.cpp", "7.5", 8)
    turn = "4:8 " + "4:1 " * 4 + "3:8 " + "3:1 " * 4
    assert (models["dense"].parent / "log").read_text() == turn * 3, "a turn that warms up, and two"
    assert json.loads(json.dumps(times.as_dict()))["speeds"]["pruned"]["decode"] == 1 / 3


def test_the_first_turn_does_not_count_and_the_median_does():
    seconds = iter([9.0, 1.0, 4.0, 2.0])
    found = rates({"m": lambda prompt, count: dict.fromkeys(("prefill", "decode"), next(seconds))}, 50, TIMES_JOB)
    assert found == {"m": {"prefill": 8 / 2.0, "decode": 4 / 2.0}}
    with pytest.raises(ValueError, match="time more tokens"):
        rates({"m": lambda *_: {"prefill": 1.0, "decode": 0.0}}, 50, TIMES_JOB)


TIMES_JOB = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 3}


@pytest.mark.parametrize(
    ("content", "length", "words"),
    [
        (b"broken", 8, "llama.cpp: it cannot run pruned .*pruned.gguf: no such tensor"),
        (b"crash", 8, "llama.cpp ended with exit code 1: fault"),
        (b"G", 61, "trained on 64 positions, fewer than the 65 tokens"),
    ],
)
def test_what_the_engine_cannot_run_is_one_sentence(engine, models, content, length, words):
    models["pruned"].write_bytes(content)
    with pytest.raises(RunError, match=words):
        time_engine(models, engine, replace(TIMES, prompt_tokens=length))


def test_without_the_engine_nothing_is_run(models, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_run", lambda *_: pytest.fail("was run"))
    here = EngineConfig("llama.cpp")
    assert here.python == sys.executable
    with pytest.raises(UsageError, match="llama-cpp-python is not installed for .*--engine_python"):
        time_engine(models, here, TIMES)
    for path in ("/nowhere/python", str(tmp_path), str(models["dense"])):
        with pytest.raises(UsageError, match=f"--engine_python {path} is no program"):
            check_engine(models, EngineConfig("llama.cpp", path))
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(UsageError, match="cannot be run"):
        check_engine(models, EngineConfig("llama.cpp", str(tmp_path / "text")))


def test_as_many_threads_as_this_process_may_use(models, monkeypatch):
    asked = []
    monkeypatch.setattr(engines, "check_engine", lambda *_: None)
    monkeypatch.setattr(engines, "_run", lambda job, _: asked.append(job["threads"]) or {"error": "enough"})
    monkeypatch.setattr(engines.os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    for threads in (None, 2):
        with pytest.raises(RunError):
            time_engine(models, EngineConfig("llama.cpp", engine_threads=threads), TIMES)
    assert asked == [3, 2]


def test_a_python_may_be_named_from_here(engine, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert time_engine(models, EngineConfig("llama.cpp", "./python"), TIMES).version == "7.5"


def test_what_is_no_export_for_the_engine_is_refused(engine, models, tmp_path):
    with pytest.raises(
        UsageError, match=r"pruned is m.bin: write one by python -m LLMPruner.export m.bin --format gguf and .* pruned=PATH"
    ):
        check_engine(models | {"pruned": Path("m.bin")}, engine)
    with pytest.raises(UsageError, match="--format hf"):
        check_engine(models, replace(engine, engine="vllm"))


def test_code_that_an_export_brings_is_this_packages_own(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    own = tmp_path / "modeling_pruned_llama.py"
    own.write_bytes((EXPORT_FOLDER / own.name).read_bytes())
    assert engines.trusted(tmp_path)
    for name, text in ((own.name, "import os"), ("other.py", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=f"{name} is not this package's own"):
            engines.trusted(tmp_path)
        own.write_bytes((EXPORT_FOLDER / own.name).read_bytes())
    (tmp_path / "config.json").write_text("{}")
    assert not engines.trusted(tmp_path), "without auto_map nobody runs it"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "tgi"}, "--engine must be llama.cpp or vllm, got tgi"),
        ({"engine_python": "python"}, "--engine_python needs --engine"),
        ({"engine": "vllm", "engine_threads": 0}, "--engine_threads must be 1 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        EngineConfig(**settings)


def test_the_table_has_ratios_to_the_first_model():
    times = EngineTimes("vllm", "0.1", 8, 4, 2, {"dense": EngineSpeed(100.0, 10.0), "pruned": EngineSpeed(130.0, 12.5)})
    lines = engine_table(times).splitlines()
    assert "vllm 0.1" in lines[0] and lines[1].split() == ["dense", "pruned"]
    assert lines[2].split()[-4:] == ["100.0", "(1.000x)", "130.0", "(1.300x)"]
    assert lines[3].split()[-1] == "(1.250x)"
