"""One pruning run as it was asked for: what it needs, all checks before a weight is read, and its token windows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import require_free_space
from LLMPruner.config import EvalConfig, ExportConfig, FinetuneConfig, PruneConfig, RunConfig
from LLMPruner.data import check_corpus, load_windows
from LLMPruner.errors import UsageError
from LLMPruner.importance.allocation import Budget, make_budget, reads_layer_scores
from LLMPruner.importance.criteria import CRITERIA
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.importance.search_state import MEASURES, SearchState
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model import checkpoint_bytes, export_bytes
from LLMPruner.run import check_export_places
from LLMPruner.source import ModelSource, check_seq_len

if TYPE_CHECKING:
    import torch

SEARCH_FILE = "search_state.json"


@dataclass(frozen=True)
class PruneJob:
    """Everything one pruning run was asked for."""

    source: ModelSource
    prune: PruneConfig
    run: RunConfig = RunConfig()
    evaluation: EvalConfig = EvalConfig()
    finetune: FinetuneConfig | None = None
    export: ExportConfig = ExportConfig()
    save: bool = True
    test_original: bool = False
    test_pruned: bool = False
    dry_run: bool = False

    @property
    def measures(self) -> bool:
        """Whether any PPL is to be reported; fine-tuning without one would be blind."""
        return not self.dry_run and (self.test_original or self.test_pruned or self.finetune is not None)

    @property
    def analyzes(self) -> bool:
        """Whether layers are to be scored: the strategy reads scores and no file brings them."""
        return reads_layer_scores(self.prune) and self.prune.layer_importance_file is None

    @property
    def calibrates(self) -> bool:
        """Whether anything after the layer analysis reads calibration text."""
        return (
            CRITERIA[self.prune.importance].needs is not None
            or REPAIRS[self.prune.repair] is not None
            or self.prune.pruning_strategy == "search"
        )

    @property
    def writes(self) -> bool:
        """Whether the dense model writes calibration text itself."""
        return self.prune.self_samples > 0 and REPAIRS[self.prune.repair] is not None

    @property
    def distills(self) -> bool:
        """Whether healed layers are trained towards the dense model's; this needs the repair's windows."""
        return self.prune.distill_epochs > 0 and REPAIRS[self.prune.repair] is not None

    @property
    def saves_finetuned(self) -> bool:
        """Whether a second checkpoint is written."""
        return self.save and self.finetune is not None


def preflight(job: PruneJob, folder: Path) -> tuple[Budget, LayerImportance | None]:
    """All checks that need no weights: the budget in integers, and scores to be re-used (None: to be measured).

    Raises UsageError, with nothing changed on disk.
    """
    geometry, config = job.source.geometry, job.prune
    if job.source.is_pruned:
        raise UsageError(f"{job.source.path} is pruned already: prune the dense model it came from with a larger ratio")
    _check_lengths(job)
    _check_outputs(job, folder)
    budget = make_budget(geometry, config)
    if config.resume:
        SearchState.load(folder / SEARCH_FILE, search_key(job), budget.sublayers)
    importance = None
    if config.layer_importance_file is not None:
        file = Path(config.layer_importance_file)
        importance = LayerImportance.load(file, job.source.fingerprint(), geometry.num_layers)
    for corpus, split, seq_len in _corpora(job):
        check_corpus(corpus, job.run.data_dir, split, seq_len)
    if not job.dry_run:
        size = checkpoint_bytes(geometry.dense_params - budget.target, job.run.dtype, job.run.device)
        size *= job.save + job.saves_finetuned
        size += export_bytes(geometry.dense_params, job.export, job.run.dtype, job.run.device)
        require_free_space(folder, size, "what the run writes")
    return budget, importance


def check_exports(source: ModelSource, tokenizer: Any, export: ExportConfig) -> None:
    """Raise UsageError where a wanted export could not be written, before any weight is read."""
    if export.formats:
        from LLMPruner.export.writer import check_export

        check_export(source, tokenizer, export)


def search_key(job: PruneJob) -> dict[str, Any]:
    """What a search's result depends on: an interrupted one is continued only under the same."""
    repair = ("repair_samples", "self_samples", "distill_epochs")
    free = ("resume", "search_minutes", "search_generations", "layer_importance_file", *repair)
    settings = {name: value for name, value in asdict(job.prune).items() if name not in free}
    run = {name: getattr(job.run, name) for name in ("seed", "data_dir", "dtype", "device")}
    return {"measures": MEASURES, "model": job.source.fingerprint(), **run, **settings}


def _check_outputs(job: PruneJob, folder: Path) -> None:
    """Raise UsageError where the run would overwrite its input, or leave a checkpoint beside another run's plan."""
    if job.dry_run:
        return
    check_export_places(job.export, folder, job.source.path)
    outputs = [folder / "pytorch_model.bin", folder / "pytorch_model_finetuned.bin"]
    for output in outputs:
        if output.exists() and output.samefile(job.source.path):
            raise UsageError(f"--save_ckpt_log_name {folder.name} would overwrite {job.source.path}: choose another name")
    if outputs[0].exists() and not job.save:
        raise UsageError(f"{outputs[0]} would no longer fit the plan beside it: choose another name, or save this model too")


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


def _corpora(job: PruneJob) -> list[tuple[str, str, int]]:
    wanted = []
    if job.calibrates or job.analyzes:
        wanted.append((job.prune.calibration_dataset, "train", job.prune.calibration_seq_len))
    if job.prune.pruning_strategy == "search":
        wanted.append((job.prune.calibration_dataset, "validation", job.prune.search_seq_len))
    if job.measures:
        wanted += [(name, "test", job.evaluation.seq_len) for name in job.evaluation.datasets]
    if job.finetune is not None:
        wanted.append((job.finetune.dataset, "train", job.finetune.seq_len))
    return wanted


@dataclass(frozen=True)
class JobWindows:
    """The token windows of every stage, cut before the weights are read: a bad corpus shows early."""

    layers: torch.Tensor | None
    calibration: torch.Tensor | None
    repair: torch.Tensor | None
    held_out: torch.Tensor | None
    evaluation: dict[str, torch.Tensor]
    finetuning: torch.Tensor | None

    def all(self) -> list[torch.Tensor | None]:
        """Every stage's windows."""
        return [self.layers, self.calibration, self.repair, self.held_out, self.finetuning, *self.evaluation.values()]


def cut_windows(job: PruneJob, tokenizer: Any) -> JobWindows:
    """Calibration windows from the train split, evaluation windows from the test split."""
    from LLMPruner.evaluator.ppl import load_eval_windows

    config = job.prune

    def calibration(seq_len: int, samples: int, split: str = "train") -> torch.Tensor:
        corpus, seed, data_dir = config.calibration_dataset, job.run.seed, job.run.data_dir
        return load_windows(tokenizer, corpus, split, seq_len=seq_len, samples=samples, data_dir=data_dir, seed=seed)

    held_out = None
    if config.pruning_strategy == "search":
        held_out = calibration(config.search_seq_len, config.search_windows[0], "validation")
    return JobWindows(
        layers=calibration(config.layer_importance_seq_len, config.layer_importance_samples) if job.analyzes else None,
        calibration=calibration(config.calibration_seq_len, config.channel_importance_samples) if job.calibrates else None,
        repair=calibration(config.calibration_seq_len, config.repair_windows) if job.calibrates else None,
        held_out=held_out,
        evaluation=load_eval_windows(tokenizer, job.evaluation, job.run.data_dir) if job.measures else {},
        finetuning=_finetuning_windows(job, tokenizer),
    )


def _finetuning_windows(job: PruneJob, tokenizer: Any) -> torch.Tensor | None:
    if job.finetune is None or job.dry_run:
        return None
    from LLMPruner.trainer.finetuner import training_windows

    return training_windows(tokenizer, job.finetune, job.run.data_dir, job.run.seed)
