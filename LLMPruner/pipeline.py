"""The stages of pruning in order, free of any command line: analyse, plan, apply, measure, save, fine-tune."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from LLMPruner.checkpoint import write_text
from LLMPruner.config import PLAN_FILE, ExportConfig, PruneConfig
from LLMPruner.importance.allocation import Budget, adds_bias, allocate, build_plan, level_limits
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LayerImportance, analyze_layers
from LLMPruner.importance.search_state import SearchState
from LLMPruner.job import SEARCH_FILE, JobWindows, PruneJob, check_exports, cut_windows, search_key
from LLMPruner.model import load_model, load_tokenizer, save_model, versions
from LLMPruner.plan import PruningPlan
from LLMPruner.source import check_token_ids

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.forward import LayerRunner
    from LLMPruner.model import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")


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
    plan = _plan(job, run, loaded, runner, budget, importance, windows)
    _report_plan(run, plan, budget)
    if job.dry_run:
        return loaded
    _describe(job, run, plan, importance)
    text = _repair_text(job, run, loaded, windows)
    with run.stage(f"apply (repair {job.prune.repair})"):
        loaded.plan = plan
        distillation = {"distill_epochs": job.prune.distill_epochs, "seed": job.run.seed}
        apply_plan(runner, plan, repair=job.prune.repair, windows=text, **distillation)
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


def export_model(run: Run, loaded: LoadedModel, export: ExportConfig, metrics: str = "metrics.json") -> None:
    """Write the model's exports into the run's folder, with the PPL that the run measured on their cards."""
    if not export.formats:
        return
    from LLMPruner.export.writer import write_exports

    with run.stage("export"):
        write_exports(loaded, export, run.dir, run.metrics.get("ppl", {}))
    run.save_metrics(metrics)


def _plan(
    job: PruneJob,
    run: Run,
    loaded: LoadedModel,
    runner: LayerRunner,
    budget: Budget,
    importance: LayerImportance | None,
    windows: JobWindows,
) -> PruningPlan:
    """The plan by the job's strategy: weights of layer scores, one ranking, or the search."""
    scores = None if importance is None else importance.scores
    if job.prune.pruning_strategy != "search":
        with run.stage("plan"):
            return make_plan(runner, budget, job.prune, scores, windows.calibration, seed=job.run.seed)
    from LLMPruner.importance.search import search

    key, path = search_key(job), run.dir / SEARCH_FILE
    state = SearchState.load(path, key, budget.sublayers) if job.prune.resume else SearchState()

    def save(found: SearchState) -> None:
        if not job.dry_run:
            found.save(path, key)

    with run.stage("search"):
        deadline = time.monotonic() + 60 * job.prune.search_minutes
        kept, units = search(
            runner,
            budget,
            job.prune,
            windows.calibration,
            search_text(job, loaded, windows.held_out),
            limits=level_limits(budget, job.prune, scores),
            seed=job.run.seed,
            state=state,
            save=save,
            deadline=deadline,
        )
    return build_plan(budget.geometry, kept, units, output_bias=adds_bias(job.prune))


def search_text(job: PruneJob, loaded: LoadedModel, held_out: torch.Tensor) -> torch.Tensor:
    """The search's windows: `held_out` of the corpus, and others that the model, still dense, writes itself."""
    count = min(job.prune.search_windows[1], len(held_out))  # no more than the corpus has, however many tokens are asked for
    if count == 0:
        return held_out
    from LLMPruner.self_text import interleaved, write_windows

    seed = job.run.seed + 1  # not what the repair is fitted on
    written = write_windows(loaded.model, loaded.tokenizer, samples=count, seq_len=held_out.shape[1], seed=seed)
    return interleaved(held_out, written, seed=job.run.seed)


def _repair_text(job: PruneJob, run: Run, loaded: LoadedModel, windows: JobWindows) -> torch.Tensor | None:
    """The repair's windows of the corpus, and those that the model, still dense, writes itself."""
    if not job.writes:
        return windows.repair
    from LLMPruner.self_text import mixed, write_windows

    count, seq_len = job.prune.self_samples, job.prune.calibration_seq_len
    with run.stage("write"):
        written = write_windows(loaded.model, loaded.tokenizer, samples=count, seq_len=seq_len, seed=job.run.seed)
    return mixed(windows.repair, written, seed=job.run.seed)


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
    written = {"written": f"and {job.prune.self_samples} windows that the dense model wrote"} if job.writes else {}
    distilled = {"distill_epochs": job.prune.distill_epochs} if job.distills else {}
    loaded.provenance |= {
        "command": run.command,
        "seed": job.run.seed,
        "versions": versions(),
        "parameters": loaded.plan.total_params,
        "calibration": {"corpus": job.prune.calibration_dataset, "split": "train"} | written,
        "settings": asdict(job.prune),
    } | distilled


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
