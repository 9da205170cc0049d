"""What of a run is done, on disk, so that `--resume` goes on where a dead one stopped.

`journal.json` holds the run's key (model, settings, text, format) and what its finished stages found; `work/` the layers that
are finished, the text that the dense model wrote, and the checkpoints of a training. Both describe one run: a new one begins
anew, and a finished one keeps the journal alone. A fine-tuning of its own has `journal_finetune.json` and `work_finetune/`, so
that it may go into the folder of its pruning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import read_json_file, write_atomically, write_json

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.finished import FinishedLayers
    from LLMPruner.model.source import ModelSource
    from LLMPruner.stages.job import PruneJob, RecoverJob
    from LLMPruner.training_config import FinetuneConfig

logger = logging.getLogger("LLMPruner")

JOURNAL_FILE, WORK, SEARCH_FILE = "journal.json", "work", "search_state.json"  # of an experiment
FINETUNE = "finetune"  # what is added to these names for a fine-tuning of its own
FORMAT = 4  # raised whenever what is kept comes to mean something else
# What may differ between a run and its continuation: how long the search may take, and where weights lie meanwhile.
FREE = ("search_minutes", "stream", "hidden_gb", "report_to")


def prune_key(job: PruneJob) -> dict[str, Any]:
    """What a pruning's result depends on, by flag; `auto` as what it stands for here. The text joins when it has been read."""
    asked = {"--save_model": job.save, "--test_original_ppl": job.test_original, "--test_after_prune": job.test_pruned}
    parts = [("", asdict(job.prune)), ("eval_", asdict(job.evaluation))]
    parts += [] if job.finetune is None else _training("finetune_", job.finetune)
    of_files = {}
    if job.prune.layer_importance_file is not None:
        of_files["the file of --layer_importance_config"] = mark_of(Path(job.prune.layer_importance_file).read_bytes().hex())
    return _key(job, of_files, asked | {"--finetune": job.finetune is not None}, parts)


def recover_key(job: RecoverJob) -> dict[str, Any]:
    """The same of a fine-tuning."""
    asked = {"--save_model": job.save, "--test_before": job.test_before, "--test_after": job.test_after}
    of_files = {} if job.teacher is None else {"the teacher": _model(job.teacher)}
    return _key(job, of_files, asked, [*_training("", job.training), ("eval_", asdict(job.evaluation))])


def _training(prefix: str, config: FinetuneConfig) -> list[tuple[str, Mapping[str, Any]]]:
    """The settings of a training by the prefix of their flags."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("lora", "distill", "prefix")}
    return [(prefix, settings), ("lora_", asdict(config.lora)), ("", asdict(config.distill))]


def _key(
    job: PruneJob | RecoverJob, of_files: dict[str, Any], asked: dict[str, Any], parts: list[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype

    device = resolve_device(job.common.device)
    common = asdict(job.common) | {"device": device.type, "dtype": dtype_name(resolve_dtype(job.common.dtype, device))}
    asked |= {"--export": job.export.formats, "--gguf_type": job.export.gguf_type}
    settings = {
        f"--{prefix}{name}": value
        for prefix, part in (("", common), *parts)
        for name, value in part.items()
        if name not in FREE
    }
    of_files = {"the model": _model(job.source), **of_files}
    key = {"the format of the journal": FORMAT, **of_files, "the number of processes": parallel.count(), **asked, **settings}
    return json.loads(json.dumps(key))  # as it is read back: lists for tuples


def _model(source: ModelSource) -> list[str]:
    return [source.fingerprint(closely=True), mark_of(dict(source.config))]


def mark_of(value: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Journal:
    """The finished stages of the run in `folder`, by name, and what they found. Without a folder nothing is kept."""

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, Any],
        done: Mapping[str, Any] | None = None,
        stages: Sequence[dict[str, Any]] = (),
        *,
        kind: str = "",
    ) -> None:
        self.folder, self.key, self.done, self.stages = folder, dict(key), dict(done or {}), list(stages)
        self.kind = kind  # what tells its names from those of a pruning in the same folder

    def follow(self, stages: list[dict[str, Any]]) -> None:
        """Keep the records of a run's stages, after those of the run that it continues."""
        stages[:0] = self.stages
        self.stages = stages

    @property
    def work(self) -> Path:
        """The folder of finished layers, written text and checkpoints."""
        return self.folder / named(WORK, self.kind)

    @property
    def run(self) -> str:
        """A mark of the run in whatever it keeps: files of another one never pass for its own."""
        return mark_of([self.key, self.done.get("text")])

    def layers(self, *, defaults: bool = False) -> FinishedLayers:
        """The run's finished layers; or those of the defaults' model, where the check of a search took that."""
        from LLMPruner.model.finished import FinishedLayers

        return FinishedLayers(self.work / "defaults" if defaults else self.work, self.run)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be done."""
        return "finished" in self.done

    def begin(self, text: str, *, resumed: bool) -> None:
        """Start, or go on with, the run on the text of this fingerprint. What another run left is removed.

        Raises UsageError where a run is continued on other text, and where a process of the run was given something else.
        """
        same = parallel.from_main([self.key, text]) == [self.key, text]  # on another machine a path may be another model
        if not parallel.least(int(same)):
            raise UsageError(
                "the processes of this run read different models, texts or settings: make them the same everywhere"
            )
        if self.folder is None:
            return
        if self.done:
            name = "the text of the corpora"
            _check_same({name: self.done.get("text")}, {name: text})
            logger.info("resuming after: %s", ", ".join(self.done))
            if parallel.main() and self.work.is_dir():
                for spilt in self.work.glob("hidden.*"):  # of a process that was killed before it could unlink it
                    spilt.unlink(missing_ok=True)
            return
        if parallel.main():
            _remove(self.work)
        if parallel.main() and not resumed and not self.kind:
            (self.folder / SEARCH_FILE).unlink(missing_ok=True)
        self.record("text", text)
        parallel.wait()  # until what was there before is gone

    def record(self, name: str, found: Any = True) -> None:
        """A stage is done; `found`, plain values, is what it found."""
        self.done[name] = found
        if self.folder is not None and parallel.main():
            path = self.folder / named(JOURNAL_FILE, self.kind)
            write_json(path, {"key": self.key, "done": self.done, "stages": self.stages})

    def once(
        self,
        name: str,
        make: Callable[[], Any],
        dump: Callable[[Any], Any] = lambda x: x,
        load: Callable[[Any], Any] = lambda x: x,
    ) -> Any:
        """What `make` gives, or gave in the run that is continued; `dump` and `load` turn it into plain values and back.

        Several processes go on with what the first one made.
        """
        if name in self.done:
            return load(self.done[name])
        made = make()
        self.record(name, parallel.from_main(dump(made)))
        return made if parallel.main() else load(self.done[name])

    def windows(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Like `once`, for token windows."""
        if self.folder is None:
            return make()
        return kept_windows(self.work / f"{name}.safetensors", self.run, make)

    def written(self) -> int:
        """Bytes of what the run that is continued has written and will not write again."""
        model, _when = self.done.get("save") or (0, 0)
        return model + sum(path.stat().st_size for path in self.work.glob("**/*") if path.is_file())

    def finish(self) -> None:
        """The run is over."""
        parallel.wait()  # until nobody reads from what is removed
        self.record("finished")
        self.clear()

    def clear(self) -> None:
        """Remove what only a run under way needs."""
        if self.folder is not None and parallel.main():
            _remove(self.work)


def kept_windows(path: Path, mark: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The windows in a file with this mark, or what `make` gives, once: the first process's."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from LLMPruner.model.finished import is_marked

    if parallel.least(int(is_marked(path, mark))):
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("windows").clone()
    made = make()
    if parallel.main():
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {"windows": made.contiguous()}
        write_atomically(path, lambda temporary: save_file(values, temporary, metadata={"run": mark}))
    return parallel.from_main(made)


def _remove(folder: Path) -> None:
    """Remove a folder; of a link to one, what it holds. Raises RunError where something cannot be removed."""
    try:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if not folder.is_symlink():
            folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"{folder} holds what an earlier run left and cannot be removed ({error}): remove it") from error


def named(file: str, kind: str) -> str:
    """A file's name with what tells its kind of run from a pruning."""
    stem, dot, suffix = file.partition(".")
    return f"{stem}_{kind}{dot}{suffix}" if kind else file


def open_journal(job: PruneJob, folder: Path) -> Journal:
    """The journal of a new pruning, or with `--resume` that of the one which died in `folder`.

    Raises UsageError where there is none to go on with, or one of another command; then the difference is named.
    """
    key, search = prune_key(job.sized()), folder / SEARCH_FILE
    if job.resume and search.is_file():
        if not (folder / JOURNAL_FILE).is_file():  # the search of a release that kept no journal
            return Journal(folder, key)
        data = _read(folder / JOURNAL_FILE)
        if "finished" in data["done"] and data["key"] != key and job.prune.pruning_strategy == "search":
            return Journal(folder, key)  # with other settings of what comes after the search
    return _opened(folder, key, resume=job.resume)


def open_finetune_journal(job: RecoverJob, folder: Path) -> Journal:
    """The same of a fine-tuning of its own."""
    return _opened(folder, recover_key(job), resume=job.resume, kind=FINETUNE)


def _opened(folder: Path, key: dict[str, Any], *, resume: bool, kind: str = "") -> Journal:
    if not resume:
        return Journal(folder, key, kind=kind)
    path = folder / named(JOURNAL_FILE, kind)
    if not path.is_file():
        raise UsageError(f"--resume: {folder} has no interrupted run: check the name, or run without --resume")
    data = _read(path)
    _check_same(data["key"], key)
    return Journal(folder, key, data["done"], data.get("stages", ()), kind=kind)


def _read(path: Path) -> dict[str, Any]:
    data = read_json_file(path, "--resume: the journal")
    if not (isinstance(data, dict) and isinstance(data.get("key"), dict) and isinstance(data.get("done"), dict)):
        raise UsageError(f"--resume: {path} is not a journal: run without --resume")
    return data


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError that names what differs between an interrupted run and the command at hand."""
    for name in [*now, *(before.keys() - now.keys())]:
        if before.get(name) != now.get(name):
            values = f"was {before.get(name)!r}, is {now.get(name)!r}" if name.startswith("--") else "is another one"
            raise UsageError(
                f"--resume: {name} {values}: repeat the interrupted command, or run without --resume to begin anew"
            )
