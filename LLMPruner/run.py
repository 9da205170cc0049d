"""One run's folder: `prune_log/<experiment>/{timestamp}`, its log, its command, and its stage records.

Of several processes of a run the first one writes all this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from LLMPruner import parallel
from LLMPruner.errors import UsageError
from LLMPruner.files import locked, restore_folder, write_json, write_text
from LLMPruner.memory import peak_memory, reset_peak_memory, return_freed_memory

LOG_ROOT = Path("prune_log")
logger = logging.getLogger("LLMPruner")


def check_experiment(name: str, flag: str) -> Path:
    """The folder of experiment `name`, not yet created. Raises UsageError for a bad name or an unwritable place."""
    if not name or name in (".", "..") or any(separator in name for separator in "/\\\0") or name.startswith("-"):
        raise UsageError(f"{flag} must be a plain folder name without path separators, got {name!r}")
    if len(name.encode()) > 200:
        raise UsageError(f"{flag} has {len(name.encode())} bytes: a folder name may have 200")
    folder = LOG_ROOT / name
    for place in (folder, LOG_ROOT, Path()):
        if place.exists() or place.is_symlink():
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise UsageError(f"{place} is not a folder that can be written: choose another {flag} or fix its permissions")
            break
    return folder


def versions() -> dict[str, str]:
    """The libraries that a result depends on."""
    import platform

    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


class Run:
    """The folder, log file and records of one command. Use as a context manager: it opens and closes the log."""

    def __init__(
        self, folder: Path, script: str, argv: Sequence[str], *, seed: int, device: str = "auto", dry_run: bool = False
    ) -> None:
        self.dir, self.device = folder, device
        self._arguments = [os.path.relpath(script), *argv]
        self.command = shlex.join(["python", *self._arguments])
        self.seed = seed
        self.dry_run = dry_run  # write nothing but the log
        self.stages: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {"command": self.command, "seed": seed, "stages": self.stages}
        if parallel.count() > 1:
            self.metrics["processes"] = parallel.count()
        self.timestamp_dir = self._new_timestamp_dir() if parallel.main() else folder
        self._handlers: list[logging.Handler] = []
        self._lock = contextlib.ExitStack()

    def _new_timestamp_dir(self) -> Path:
        base = self.dir / time.strftime("%Y-%m-%d_%H-%M-%S")
        for attempt in range(100):
            folder = base if attempt == 0 else base.with_name(f"{base.name}_{attempt}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
        raise UsageError(f"{self.dir} is full of runs of this very second: try again")

    def __enter__(self) -> Run:
        if not parallel.main():
            self._handlers = start_logging()
            return self
        if not self.dry_run:
            try:
                self._lock.enter_context(locked(self.dir))
            except UsageError:
                self._remove()
                raise
            restore_folder(self.dir)  # under the lock: on another machine a writer that lives may look dead
            self._write_script()
        self._handlers = start_logging(self.timestamp_dir / "training.log")
        logger.info("command: %s", self.command)
        logger.info("folder: %s", self.timestamp_dir)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, UsageError) and parallel.main():
            # the terminal gets one sentence; the log gets the whole story
            record = logger.makeRecord(logger.name, logging.ERROR, "", 0, "the run failed", (), (kind, error, trace))
            for handler in self._handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(record)
            error.add_note(f"the traceback is in {self.timestamp_dir / 'training.log'}")
        stop_logging(self._handlers)
        if isinstance(error, UsageError) and parallel.main():
            self._remove()
        self._lock.close()

    def _remove(self) -> None:
        """A wrong command leaves nothing behind: this run's folder goes, and its parents where they are empty."""
        shutil.rmtree(self.timestamp_dir)
        for folder in (self.dir, self.dir.parent):
            with contextlib.suppress(OSError):  # not empty: an earlier run's
                folder.rmdir()

    def _write_script(self) -> None:
        script = self.timestamp_dir / "train.sh"
        command = shlex.join([sys.executable, *self._arguments])
        write_text(script, f"#!/bin/bash\ncd {shlex.quote(str(Path.cwd()))} || exit\n{command}\n")
        script.chmod(0o755)

    def describe(self, settings: dict[str, Any], file: str = "description.txt") -> None:
        """Write `file`: the command, the folder and every setting, one a line."""
        rows = [f"command: {self.command}", f"run: {self.timestamp_dir}"]
        rows += [f"{name}: {value}" for name, value in settings.items()]
        if parallel.main():
            write_text(self.dir / file, "\n".join(rows) + "\n")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and record its seconds and peak memory; the body may add figures to the yielded dict."""
        record: dict[str, Any] = {"stage": name}
        return_freed_memory()  # what an earlier stage freed is not this one's
        reset_peak_memory(self.device)
        start, computed = time.perf_counter(), time.process_time()
        logger.info("stage %s: start", name)
        yield record
        record["seconds"] = round(time.perf_counter() - start, 2)
        record["cpu_seconds"] = round(time.process_time() - computed, 2)
        record["peak_memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        self.stages.append(record)
        logger.info("stage %s: %.1f s, peak memory %.2f GB", name, record["seconds"], record["peak_memory_gb"])

    def save_metrics(self, name: str = "metrics.json") -> None:
        """Write what was measured so far beside the checkpoint."""
        if parallel.main():
            write_json(self.dir / name, self.metrics)


def start_logging(log_file: Path | None = None) -> list[logging.Handler]:
    """Send the package's log to stdout, and to `log_file` (flushed line by line, so that tail and grep work meanwhile).

    Of several processes all but the first one only warn.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if parallel.main() else logging.WARNING)
    logger.propagate = False
    return handlers


def stop_logging(handlers: Sequence[logging.Handler]) -> None:
    """Undo `start_logging`."""
    for handler in handlers:
        logger.removeHandler(handler)
        handler.close()
