"""What a run was asked for, and all checks of it before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from LLMPruner import parallel
from LLMPruner.config import AFTER_SEARCH, EXPORT_FORMATS, PROVENANCE_FILE, CommonConfig, EvalConfig, ExportConfig, PruneConfig
from LLMPruner.data.corpora import check_corpus
from LLMPruner.data.mixture import check_mixture
from LLMPruner.data.windows import PruneWindows, prune_windows
from LLMPruner.errors import UsageError
from LLMPruner.files import require_free_space
from LLMPruner.importance.allocation import reads_layer_scores
from LLMPruner.importance.budget import Budget, adds_bias, make_budget
from LLMPruner.importance.criteria import CRITERIA
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.importance.search.state import STATE_FORMAT, SearchState
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model.device import resolve_device
from LLMPruner.model.size import checkpoint_bytes, export_bytes
from LLMPruner.model.source import ModelSource, check_seq_len
from LLMPruner.stages.journal import FREE, SEARCH_FILE, Journal, open_finetune_journal, open_journal
from LLMPruner.stages.teaching import check_memory, check_packages, disk_bytes
from LLMPruner.training_config import FinetuneConfig

MODEL_FILE, FINETUNED_FILE = "pytorch_model.bin", "pytorch_model_finetuned.bin"  # of an experiment


@dataclass(frozen=True)
class PruneJob:
    """Everything one pruning run was asked for."""

    source: ModelSource
    prune: PruneConfig
    common: CommonConfig = CommonConfig()
    evaluation: EvalConfig = EvalConfig()
    finetune: FinetuneConfig | None = None
    export: ExportConfig = ExportConfig()
    save: bool = True
    test_original: bool = False
    test_pruned: bool = False
    dry_run: bool = False
    resume: bool = False

    @property
    def measures(self) -> bool:
        """Whether any PPL is to be reported; fine-tuning without one would be blind."""
        return self.test_original or self.test_pruned or self.finetune is not None

    @property
    def analyzes(self) -> bool:
        """Whether layers are to be scored: the strategy reads scores and no file brings them."""
        return reads_layer_scores(self.prune) and self.prune.layer_importance_file is None

    @property
    def calibrates(self) -> bool:
        """Whether anything after the layer analysis reads calibration text."""
        readers = CRITERIA[self.prune.importance].needs, REPAIRS[self.prune.repair]
        return any(reader is not None for reader in readers) or self.prune.pruning_strategy == "search"

    @property
    def writes(self) -> bool:
        """Whether the dense model writes calibration text itself."""
        return self.prune.self_samples > 0 and REPAIRS[self.prune.repair] is not None

    @property
    def distills(self) -> bool:
        """Whether healed layers learn the dense model's hidden states; this needs the repair's windows."""
        return self.prune.distill_epochs > 0 and REPAIRS[self.prune.repair] is not None

    @property
    def distills_model(self) -> bool:
        """Whether all layers, or the last of them, learn through the head after that."""
        return self.prune.distill_model_epochs > 0 and REPAIRS[self.prune.repair] is not None

    @property
    def saves_finetuned(self) -> bool:
        """Whether a second checkpoint is written."""
        return self.save and self.finetune is not None

    def sized(self) -> PruneJob:
        """The job with the settings that depend on its device."""
        return replace(self, prune=self.prune.sized(resolve_device(self.common.device).type))

    @property
    def unstreamable(self) -> str | None:
        """What of the job needs all weights at once; None where nothing does."""
        wanted = {
            "--pruning_strategy search": self.prune.pruning_strategy == "search",
            "--self_samples": self.writes,
            "--distill_model_epochs": self.distills_model and self.prune.distill_last is None,
            "--finetune": self.finetune is not None,
        }
        return next((flag for flag, so in wanted.items() if so), None)

    @property
    def undivided(self) -> str | None:
        """What of the job one process does alone; None where several can share all of it."""
        return self.unstreamable or ("--distill_epochs" if self.distills else "--distill_last" if self.distills_model else None)

    def windows(self, tokenizer: Any) -> PruneWindows:
        """The token windows of every stage."""
        return prune_windows(
            tokenizer,
            self.prune,
            self.common,
            analyzes=self.analyzes,
            calibrates=self.calibrates,
            evaluation=self.evaluation if self.measures else None,
        )


@dataclass(frozen=True)
class RecoverJob:
    """Everything one fine-tuning run was asked for."""

    source: ModelSource
    training: FinetuneConfig
    evaluation: EvalConfig
    common: CommonConfig = CommonConfig()
    export: ExportConfig = ExportConfig()
    save: bool = True
    test_before: bool = False
    test_after: bool = False
    teacher: ModelSource | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        evaluation = replace(self.evaluation, text_format=self.common.text_format)  # one run measures on one kind of text
        object.__setattr__(self, "evaluation", evaluation)

    @property
    def measures(self) -> bool:
        """Whether any PPL is to be reported."""
        return self.test_before or self.test_after


def check_prune(job: PruneJob, folder: Path) -> tuple[Budget, LayerImportance | None]:
    """All checks that need no weights: the budget in integers, and scores to be re-used (None: to be measured).

    Raises UsageError, with nothing changed on disk.
    """
    geometry, config = job.source.geometry, job.prune
    if job.source.is_pruned:
        raise UsageError(f"{job.source.path} is pruned already: prune the dense model it came from with a larger ratio")
    _check_lengths(job)
    if parallel.count() > 1 and job.undivided:
        raise UsageError(f"{job.undivided} is work for one process: run without it, or without the launcher")
    if job.common.stream == "on" and job.unstreamable:
        raise UsageError(
            f"{job.unstreamable} needs all weights in memory at once: run without it, or without --stream on"
            + (", and fine-tune afterwards with test_finetuning.py" if job.unstreamable == "--finetune" else "")
        )
    if not job.dry_run:
        check_export_places(job.export, folder, job.source.path)
        _check_not_overwritten(job.source, folder, (MODEL_FILE, FINETUNED_FILE), "--save_ckpt_log_name")
        if (folder / MODEL_FILE).exists() and not job.save:
            raise UsageError(
                f"{folder / MODEL_FILE} would no longer fit the plan beside it: choose another name, or save this model too"
            )
    budget = make_budget(geometry, config)
    if job.dry_run:  # neither weights nor text need be there
        return budget, None
    importance, scores = None, config.layer_importance_file
    if scores is not None:
        importance = LayerImportance.load(Path(scores), job.source.fingerprint(), geometry.num_layers)
    journal = open_journal(job, folder) if job.resume else None
    if journal is not None and config.pruning_strategy == "search" and not {"plan", "finished"} & journal.done.keys():
        load_search(job, folder, budget)
    _check_text(job)
    _check_room(job, geometry.dense_params - budget.target, folder, journal)
    return budget, importance


def _check_room(job: PruneJob, params: int, folder: Path, journal: Journal | None) -> None:
    """Raise UsageError where memory or disk have no room for what a run does whose pruned model has so many parameters."""
    if job.finetune is not None:
        check_memory(params, job.finetune, job.common)
    # the layers that are finished lie beside the model until the end
    sizes = [params] * (1 + job.save + job.saves_finetuned)
    _check_space(job, sizes, folder, 0 if job.finetune is None else disk_bytes(params, job.finetune), journal)


def check_recover(job: RecoverJob, folder: Path) -> None:
    """All checks that need no weights. Raises UsageError, with nothing changed on disk."""
    if job.common.stream == "on":
        raise UsageError("training needs all weights in memory at once: run without --stream on")
    seq_len, data_dir, text_format = job.training.seq_len, job.common.data_dir, job.common.text_format
    check_seq_len(job.source, "--seq_len", seq_len)
    check_mixture(job.training, job.common)
    check_packages(job.training, job.common)
    if job.measures:
        for name in job.evaluation.datasets:
            check_corpus(name, data_dir, "test", seq_len, text_format)
    if job.save:
        _check_not_overwritten(job.source, folder, (FINETUNED_FILE,), "--save_name")
    check_export_places(job.export, folder, job.source.path)
    journal = open_finetune_journal(job, folder) if job.resume else None
    params = job.source.plan.total_params
    check_memory(params, job.training, job.common)
    _check_space(job, [params] * job.save, folder, disk_bytes(params, job.training), journal)


def check_exports(source: ModelSource, tokenizer: Any, export: ExportConfig, prune: PruneConfig | None = None) -> None:
    """Raise UsageError where a wanted export could not be written, before any weight is read; `prune`: it is to be pruned."""
    if export.formats:
        from LLMPruner.export.writer import check_export

        check_export(source, tokenizer, export, prunes=prune is not None, adds_bias=prune is not None and adds_bias(prune))


def check_export_places(export: ExportConfig, folder: Path, source: Path) -> None:
    """Raise UsageError where an export into `folder` would replace the model that is read, or what no export wrote."""
    for form in export.formats:
        place = folder / EXPORT_FORMATS[form]
        if place.is_symlink():
            raise UsageError(f"{place} is a link: an export would replace it, choose another folder or remove it")
        if not place.exists():
            continue
        if place.samefile(source):
            raise UsageError(f"the export {place} would replace the model that is read: choose another folder or name")
        if not _is_export(place, form):
            raise UsageError(f"{place} is something else than an export, which would replace it: choose another folder")
    if "gguf" in export.formats:
        from LLMPruner.export.card import check_beside

        check_beside(folder / EXPORT_FORMATS["gguf"])


def load_search(job: PruneJob, folder: Path, budget: Budget) -> SearchState:
    """The state of the search that `folder` holds, or of one that has not begun. Raises UsageError for that of another one."""
    path = folder / SEARCH_FILE
    if not (job.resume and path.is_file()):
        return SearchState()
    return SearchState.load(path, search_key(job.sized()), budget.sublayers)


def search_key(job: PruneJob) -> dict[str, Any]:
    """What a search's result depends on: an interrupted one is continued only under the same."""
    free = ("search_minutes", "search_generations", "layer_importance_file", *AFTER_SEARCH, *FREE)
    settings = {name: value for name, value in (asdict(job.common) | asdict(job.prune)).items() if name not in free}
    return {"format": STATE_FORMAT, "model": job.source.fingerprint(), **settings}


def _is_export(place: Path, form: str) -> bool:
    if form != "gguf":
        return place.is_dir() and (not any(place.iterdir()) or (place / PROVENANCE_FILE).is_file())
    if not place.is_file():
        return False
    with open(place, "rb") as handle:
        return handle.read(4) == b"GGUF"


def _check_not_overwritten(source: ModelSource, folder: Path, names: Iterable[str], flag: str) -> None:
    for output in (folder / name for name in names):
        if output.exists() and output.samefile(source.path):
            raise UsageError(f"{flag} {folder.name} would overwrite {source.path}: choose another name")


def _check_space(job: PruneJob | RecoverJob, sizes: Iterable[int], folder: Path, more: int, journal: Journal | None) -> None:
    """Raise UsageError unless the disk holds checkpoints of so many parameters each, the exports, and so many bytes `more`,
    but for what the run that `journal` continues has written."""
    dtype, device = job.common.dtype, job.common.device
    size = sum(checkpoint_bytes(params, dtype, device) for params in sizes) + more
    size += export_bytes(job.source.geometry.dense_params, job.export, dtype, device)
    if journal is not None:
        size -= size if journal.finished else journal.written()
    require_free_space(folder, size, "what the run writes")


def _check_lengths(job: PruneJob) -> None:
    lengths = {
        "--calibration_seq_len": job.prune.calibration_seq_len,
        "--layer_importance_seq_len": job.prune.layer_importance_seq_len,
    }
    if job.measures:
        lengths["--eval_seq_len"] = job.evaluation.seq_len
    if job.finetune is not None:
        lengths[job.finetune.prefix + "seq_len"] = job.finetune.seq_len
    for flag, length in lengths.items():
        check_seq_len(job.source, flag, length)


def _check_text(job: PruneJob) -> None:
    wanted = []
    if job.calibrates or job.analyzes:
        wanted.append((job.prune.calibration_dataset, "train", job.prune.calibration_seq_len))
    if job.prune.pruning_strategy == "search":
        wanted.append((job.prune.calibration_dataset, "validation", job.prune.search_seq_len))
    if job.measures:
        wanted += [(name, "test", job.evaluation.seq_len) for name in job.evaluation.datasets]
    for corpus, split, seq_len in wanted:
        check_corpus(corpus, job.common.data_dir, split, seq_len, job.common.text_format)
    if job.finetune is not None:
        check_mixture(job.finetune, job.common)
        check_packages(job.finetune, job.common)
