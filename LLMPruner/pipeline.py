"""The stages of pruning in order, free of any command line: analyse, plan, apply, measure, save, fine-tune."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import require_free_space, write_text
from LLMPruner.config import PLAN_FILE, EvalConfig, ExportConfig, FinetuneConfig, PruneConfig, RunConfig
from LLMPruner.data import check_corpus, load_windows
from LLMPruner.errors import UsageError
from LLMPruner.importance.allocation import (
    Budget,
    adds_bias,
    allocate,
    build_plan,
    level_limits,
    make_budget,
    reads_layer_scores,
)
from LLMPruner.importance.criteria import CRITERIA, score_units
from LLMPruner.importance.layer_analyzer import LayerImportance, analyze_layers
from LLMPruner.importance.search import SearchState
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model import (
    checkpoint_bytes,
    export_bytes,
    load_model,
    load_tokenizer,
    save_model,
    versions,
)
from LLMPruner.plan import PruningPlan
from LLMPruner.run import check_export_places
from LLMPruner.source import ModelSource, check_seq_len, check_token_ids

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.forward import LayerRunner
    from LLMPruner.model import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")

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
        SearchState.load(folder / SEARCH_FILE, _search_key(job))
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


def prune(job: PruneJob, run: Run, budget: Budget, importance: LayerImportance | None = None) -> LoadedModel:
    """Run all stages of `job` into the folder of `run`; returns the pruned (and fine-tuned) model."""
    import torch

    from LLMPruner.forward import LayerRunner
    from LLMPruner.methods.apply import apply_plan

    torch.manual_seed(job.run.seed)
    logger.info(
        "budget: remove %s of the %s's %s parameters (ratio %s)",
        f"{budget.target:,}",
        budget.base_name,
        f"{budget.base:,}",
        job.prune.pruning_ratio,
    )
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        windows = cut_windows(job, tokenizer)
        check_token_ids(job.source, "--base_model", *windows.all())
        check_exports(job.source, tokenizer, job.export)
        loaded = load_model(job.source, dtype=job.run.dtype, device=job.run.device, tokenizer=tokenizer)
        runner = LayerRunner(loaded.model)
    results: dict[str, list[Perplexity]] = {}
    if job.test_original and not job.dry_run:
        results["original"] = _measure(run, loaded, windows.evaluation, "original")
    if job.analyzes:
        importance = _analyze(job, run, runner, windows.layers)
    plan = _plan(job, run, runner, budget, importance, windows)
    _report_plan(run, plan, budget)
    if job.dry_run:
        return loaded
    _describe(job, run, plan, importance)
    text = _repair_text(job, run, loaded, windows)
    with run.stage(f"apply (repair {job.prune.repair})"):
        loaded.plan = plan
        apply_plan(runner, plan, repair=job.prune.repair, windows=text)
    _record(job, run, loaded)
    if job.save:  # before anything that may take long or fail
        with run.stage("save"):
            save_model(run.dir / "pytorch_model.bin", loaded)
        logger.info("saved %s", run.dir / "pytorch_model.bin")
    if job.test_pruned or job.finetune is not None:
        results["pruned"] = _measure(run, loaded, windows.evaluation, "pruned")
    _save_results(run, plan, results)
    if job.finetune is not None:
        _finetune(job, run, loaded, windows.finetuning)
        results["finetuned"] = _measure(run, loaded, windows.evaluation, "finetuned")
        _save_results(run, plan, results)
    if results:
        _log_table(plan, results)
    export_model(run, loaded, job.export)
    return loaded


def check_exports(source: ModelSource, tokenizer: Any, export: ExportConfig) -> None:
    """Raise UsageError where a wanted export could not be written, before any weight is read."""
    if export.formats:
        from LLMPruner.export.writer import check_export

        check_export(source, tokenizer, export)


def export_model(run: Run, loaded: LoadedModel, export: ExportConfig, metrics: str = "metrics.json") -> None:
    """Write the model's exports into the run's folder, with the PPL that the run measured on their cards."""
    if not export.formats:
        return
    from LLMPruner.export.writer import write_exports

    with run.stage("export"):
        write_exports(loaded, export, run.dir, run.metrics.get("ppl", {}))
    run.save_metrics(metrics)


def _plan(
    job: PruneJob, run: Run, runner: LayerRunner, budget: Budget, importance: LayerImportance | None, windows: JobWindows
) -> PruningPlan:
    """The plan by the job's strategy: weights of layer scores, one ranking, or the search."""
    scores = None if importance is None else importance.scores
    if job.prune.pruning_strategy != "search":
        with run.stage("plan"):
            return make_plan(runner, budget, job.prune, scores, windows.calibration, seed=job.run.seed)
    from LLMPruner.importance.search import search

    key, path = _search_key(job), run.dir / SEARCH_FILE
    state = SearchState.load(path, key) if job.prune.resume else SearchState()

    def save(found: SearchState) -> None:
        if not job.dry_run:
            found.save(path, key)

    with run.stage("search"):
        kept, units = search(
            runner,
            budget,
            job.prune,
            windows.calibration,
            windows.held_out,
            limits=level_limits(budget, job.prune, scores),
            seed=job.run.seed,
            state=state,
            save=save,
        )
    return build_plan(budget.geometry, kept, units, output_bias=adds_bias(job.prune))


def _repair_text(job: PruneJob, run: Run, loaded: LoadedModel, windows: JobWindows) -> torch.Tensor | None:
    """The repair's windows of the corpus, and those that the model, still dense, writes itself."""
    if not job.prune.self_samples or REPAIRS[job.prune.repair] is None:
        return windows.repair
    from LLMPruner.self_text import mixed, write_windows

    count, seq_len = job.prune.self_samples, job.prune.calibration_seq_len
    with run.stage("write"):
        written = write_windows(loaded.model, loaded.tokenizer, samples=count, seq_len=seq_len, seed=job.run.seed)
    logger.info("data: %d windows of %d tokens written by the dense model", count, seq_len)
    return mixed(windows.repair, written, seed=job.run.seed)


def _search_key(job: PruneJob) -> dict[str, Any]:
    """What a search's result depends on: an interrupted one is continued only under the same."""
    free = ("resume", "repair_samples", "self_samples", "search_minutes", "search_generations", "layer_importance_file")
    settings = {name: value for name, value in asdict(job.prune).items() if name not in free}
    return {"model": job.source.fingerprint(), "seed": job.run.seed, "data_dir": job.run.data_dir, **settings}


def make_plan(
    runner: LayerRunner,
    budget: Budget,
    config: PruneConfig,
    layer_scores: Sequence[float] | None,
    windows: torch.Tensor | None,
    *,
    seed: int,
) -> PruningPlan:
    """Split the budget over the layers, score the units on `windows` `(n, seq_len)`, keep the best ones."""
    units = score_units(runner, budget.geometry, config.importance, windows=windows, seed=seed)
    kept = allocate(budget, layer_scores, config, units)
    return build_plan(budget.geometry, kept, units, output_bias=adds_bias(config))


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
        held_out = calibration(config.search_seq_len, config.search_tokens // config.search_seq_len, "validation")
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


def _measure(run: Run, loaded: LoadedModel, windows: dict[str, torch.Tensor], label: str) -> list[Perplexity]:
    from LLMPruner.evaluator.ppl import measure

    with run.stage(f"evaluate {label}") as record:
        results = measure(loaded.model, windows, label)
        record["ppl"] = [result.as_dict() for result in results]
    return results


def _analyze(job: PruneJob, run: Run, runner: LayerRunner, windows: torch.Tensor) -> LayerImportance:
    with run.stage("layer importance"):
        return analyze_layers(
            runner,
            windows,
            job.prune.layer_importance_method,
            corpus=job.prune.calibration_dataset,
            split="train",
            seed=job.run.seed,
            fingerprint=job.source.fingerprint(),
        )


def _report_plan(run: Run, plan: PruningPlan, budget: Budget) -> None:
    geometry = plan.geometry
    for index, (groups, channels) in enumerate(zip(plan.kv_counts, plan.channel_counts, strict=True)):
        logger.info(
            "layer %2d  kv %d->%d  mlp %d->%d", index, geometry.num_kv_heads, groups, geometry.intermediate_size, channels
        )
    removed = plan.removed_params
    logger.info(
        "parameters: %s -> %s, removed %s (target %s, %.2f%% of the %s, %.2f%% of the whole model)",
        f"{geometry.dense_params:,}",
        f"{plan.total_params:,}",
        f"{removed:,}",
        f"{budget.target:,}",
        100 * removed / budget.base,
        "whole model" if budget.base_name == "model" else "selected sublayers",
        100 * removed / geometry.dense_params,
    )
    logger.info(
        "predicted size: %.1f MB at 2 bytes a parameter, %.1f MB at 4", plan.total_params * 2 / 1e6, plan.total_params * 4 / 1e6
    )
    over = removed - budget.target
    logger.info(
        "rounding: channels in multiples of %d, whole KV groups: %s parameters more than the target go (%.3f%% of the model)",
        budget.round_to,
        f"{over:,}",
        100 * over / geometry.dense_params,
    )
    run.metrics["budget"] = {
        "base": budget.base,
        "base_name": budget.base_name,
        "target": budget.target,
        "removed": removed,
        "round_to": budget.round_to,
        "removed_by_rounding": over,
    }
    run.metrics["parameters"] = {"original": geometry.dense_params, "pruned": plan.total_params}


def _describe(job: PruneJob, run: Run, plan: PruningPlan, importance: LayerImportance | None) -> None:
    """Write what is decided so far: settings, scores, plan, picture."""
    from LLMPruner.evaluator.report import plot_plan

    run.describe({"base_model": job.source.path, **asdict(job.run), **asdict(job.prune)})
    if importance is not None:
        importance.save(run.dir / "layer_importance_config.json")
    write_text(run.dir / PLAN_FILE, plan.to_json() + "\n")
    plot_plan(run.dir / "pruning_strategy.png", plan, None if importance is None else importance.scores)


def _record(job: PruneJob, run: Run, loaded: LoadedModel) -> None:
    """Put the provenance beside the weights."""
    loaded.provenance |= {
        "command": run.command,
        "seed": job.run.seed,
        "versions": versions(),
        "parameters": loaded.plan.total_params,
        "calibration": {"corpus": job.prune.calibration_dataset, "split": "train"},
        "settings": asdict(job.prune),
    }


def _finetune(job: PruneJob, run: Run, loaded: LoadedModel, windows: torch.Tensor) -> None:
    from LLMPruner.trainer.finetuner import train_and_save

    base = run.dir / "pytorch_model.bin" if job.save else job.source.path
    run.metrics["training"] = train_and_save(loaded, job.finetune, windows, run, seed=job.run.seed, save=job.save, base=base)


def _save_results(run: Run, plan: PruningPlan, results: dict[str, list[Perplexity]]) -> None:
    run.metrics["ppl"] = {role: [result.as_dict() for result in measured] for role, measured in results.items()}
    run.save_metrics()


def _log_table(plan: PruningPlan, results: dict[str, list[Perplexity]]) -> None:
    from LLMPruner.evaluator.report import comparison_table, tables_of

    parameters = {role: plan.geometry.dense_params if role == "original" else plan.total_params for role in results}
    logger.info("comparison\n%s", comparison_table(tables_of(results, parameters)))
