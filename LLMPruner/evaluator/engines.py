"""Speed of exported models in the engine that serves them, timed in a process of the engine's own environment. No torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from LLMPruner.config import EfficiencyConfig, require_at_least, setting
from LLMPruner.errors import RunError, UsageError
from LLMPruner.evaluator import engine_timer
from LLMPruner.files import existing_path

PACKAGES = {"llama.cpp": "llama-cpp-python", "vllm": "vllm"}
EXPORTS = {"llama.cpp": "gguf", "vllm": "hf"}  # what each of them reads
EXPORT_FOLDER = Path(__file__).parent.parent / "export"


@dataclass(frozen=True)
class EngineConfig:
    """Which engine times the exports, and where it is installed; how long it measures says EfficiencyConfig."""

    engine: str | None = setting(None, "time the models, which must be exports for it, in this engine too")
    engine_python: str | None = setting(None, "Python of the environment that the engine is installed in; default: this one")
    engine_threads: int | None = setting(None, "threads of llama.cpp; default: all cores that this process may use")
    engine_exports: tuple[str, ...] = setting((), "NAME=PATH: what the engine reads of a model that is no export for it")

    def __post_init__(self) -> None:
        for entry in fields(self) if self.engine is None else ():
            if getattr(self, entry.name) != entry.default:
                raise UsageError(f"--{entry.name} needs --engine {' or '.join(PACKAGES)}")
        if self.engine is not None and self.engine not in PACKAGES:
            raise UsageError(f"--engine must be {' or '.join(PACKAGES)}, got {self.engine}")
        if self.engine_threads is not None:
            require_at_least("--engine_threads", self.engine_threads, 1)

    def exports(self, paths: Mapping[str, Path]) -> dict[str, Path]:
        """What the engine reads of models by name: an export, else the model itself. Raises UsageError for a wrong NAME."""
        found: dict[str, Path] = {}
        for given in self.engine_exports:
            name, _, path = given.partition("=")
            if name not in paths or name in found or not path:
                names = ", ".join(paths)
                raise UsageError(f"--engine_exports takes NAME=PATH, once for each NAME of {names}; got {given!r}")
            found[name] = existing_path(path, "--engine_exports")
        return {name: found.get(name, path) for name, path in paths.items()}

    @property
    def python(self) -> str:
        """The interpreter, wherever it is called from; a link stays one, for it is what an environment is known by."""
        found = sys.executable if self.engine_python is None else shutil.which(self.engine_python)
        if found is None:
            raise UsageError(f"--engine_python {self.engine_python} is no program")
        return str(Path(found).absolute())


@dataclass(frozen=True)
class EngineSpeed:
    """Tokens a second of one model, batch 1: of a prompt, and one at a time after it."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class EngineTimes:
    """What an engine of a version took, by model, the first being the baseline."""

    engine: str
    version: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    speeds: dict[str, EngineSpeed]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_engine(paths: Mapping[str, Path], config: EngineConfig) -> None:
    """Raise UsageError unless the engine is installed and all models are exports that it reads. Nothing is loaded."""
    for name, path in paths.items():
        wanted = EXPORTS[config.engine]
        if not (path.suffix == ".gguf" and path.is_file() if wanted == "gguf" else (path / "config.json").is_file()):
            raise UsageError(
                f"--engine {config.engine} times exports, and {name} is {path}: write one by "
                f"python -m LLMPruner.export {path} --format {wanted} and give it by --engine_exports {name}=PATH"
            )
        if wanted == "hf":
            trusted(path)
    module = engine_timer.ENGINES[config.engine].package
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        found = subprocess.run([config.python, "-c", probe], capture_output=True, cwd=tempfile.gettempdir()).returncode == 0
    except OSError as error:
        raise UsageError(f"--engine_python {config.python} cannot be run: {error.strerror}") from error
    if not found:
        raise UsageError(
            f"{PACKAGES[config.engine]} is not installed for {config.python}: pip install it, or name by --engine_python "
            "the Python that has it"
        )


def trusted(folder: Path) -> bool:
    """Whether the exported directory brings code, which is then this package's own. Raises UsageError for anybody else's."""
    try:
        brings = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder}/config.json is not readable: {error}") from error
    for file in sorted(folder.glob("*.py")) if brings else ():
        own = EXPORT_FOLDER / file.name
        if not own.is_file() or own.read_bytes() != file.read_bytes():
            raise UsageError(f"{file} is not this package's own and is not run: export the model again")
    return brings


def time_engine(
    paths: Mapping[str, Path], config: EngineConfig, efficiency: EfficiencyConfig, *, gpu: bool = False
) -> EngineTimes:
    """Time the exports by name, the first being the baseline; all are in the engine together and take turns.

    `gpu`: llama.cpp puts all layers there, where it was built for one. Raises as `check_engine`, and RunError where the engine
    cannot run a model.
    """
    check_engine(paths, config)
    lengths = {name: getattr(efficiency, name) for name in ("prompt_tokens", "new_tokens", "repeats")}
    models = {name: str(path.resolve()) for name, path in paths.items()}
    code = [str(path.resolve()) for path in paths.values() if config.engine == "vllm" and trusted(path)]
    job = {"engine": config.engine, "models": models, "trusted": code, "gpu": gpu, **lengths}
    found = _run(job | {"threads": config.engine_threads or _cores()}, config)
    if "error" in found:
        raise RunError(f"{config.engine}: {found['error']}")
    speeds = {name: EngineSpeed(**found["rates"][name]) for name in paths}
    return EngineTimes(config.engine, found["version"], *lengths.values(), speeds)


def _cores() -> int:
    """Cores that this process may use: in a container, or under taskset, fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(job: Mapping[str, Any], config: EngineConfig) -> dict[str, Any]:
    """What the timer says; a copy of it runs, away from the modules beside it, which Python would find first."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(prefix="llmpruner.") as folder:
        script, asked, told = (Path(folder, name) for name in ("engine_timer.py", "job.json", "result.json"))
        script.write_bytes(Path(engine_timer.__file__).read_bytes())
        asked.write_text(json.dumps(job))
        command = [config.python, str(script), str(asked), str(told)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, env=settings)
        if done.returncode or not told.is_file():
            last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
            raise RunError(f"{config.engine} ended with exit code {done.returncode}: {last[:300]}")
        return json.loads(told.read_text())


def engine_table(times: EngineTimes) -> str:
    """A line per phase, a column per model, ratios to the first in brackets."""
    first = next(iter(times.speeds.values()))
    lines = [
        f"Speed in {times.engine} ({PACKAGES[times.engine]} {times.version}): medians of {times.repeats} interleaved repeats, "
        f"ratios to {next(iter(times.speeds))}",
        f"{'':36}" + "".join(f"{name:>26}" for name in times.speeds),
    ]
    for phase, tokens in (("prefill", times.prompt_tokens), ("decode", times.new_tokens)):
        rates = [getattr(speed, phase) for speed in times.speeds.values()]
        cells = [f"{rate:,.1f} ({rate / getattr(first, phase):.3f}x)" for rate in rates]
        lines.append(f"{f'{phase} (tokens/s, {tokens} tokens)':36}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
