"""The stages of pruning in order: score, plan, apply, check, measure, save, fine-tune."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from LLMPruner.config import PLAN_FILE
from LLMPruner.data.windows import PruneWindows
from LLMPruner.files import write_text
from LLMPruner.importance.budget import Budget, level_limits
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.importance.search.state import SearchState
from LLMPruner.model.load import load_model, load_tokenizer
from LLMPruner.model.source import check_token_ids
from LLMPruner.plan import PruningPlan
from LLMPruner.run import versions
from LLMPruner.stages import check, steps
from LLMPruner.stages.job import MODEL_FILE, SEARCH_FILE, PruneJob, check_exports, search_key
from LLMPruner.stages.recover import train_and_save

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")


def prune(job: PruneJob, run: Run, budget: Budget, importance: LayerImportance | None = None) -> LoadedModel:
    """Run all stages of `job` into the folder of `run`; returns the pruned (and fine-tuned) model."""
    job = job.sized()
    loaded, windows = _load(job, run, budget)
    results: dict[str, list[Perplexity]] = {}
    if job.test_original and not job.dry_run:
        results["original"] = steps.measure(run, loaded, windows.evaluation, "original", job.common.split("test"))
    if job.analyzes:
        with run.stage("layer importance"):
            importance = steps.score_layers(loaded.runner, windows.layers, job)
    plan, yardstick = _decide(job, run, loaded, budget, importance, windows)
    _report_plan(run, plan, budget)
    if job.dry_run:
        return loaded
    _describe(job, run, plan, importance)
    _heal(job, run, loaded, plan, windows.repair)
    if yardstick is not None:
        with run.stage("check") as record:
            job, loaded = check.better(job, loaded, yardstick, record)
        yardstick = None
        gc.collect()  # a model may refer to itself: the other one is to leave the device
        if loaded.plan is not plan:
            plan = loaded.plan
            _report_plan(run, plan, budget)
            _describe(job, run, plan, None)
    _record(job, run, loaded)
    if job.save:  # before anything that may take long or fail
        steps.save(run, loaded, MODEL_FILE)
    if job.test_pruned or job.finetune is not None:
        results["pruned"] = steps.measure(run, loaded, windows.evaluation, "pruned", job.common.split("test"))
    _save_results(run, plan, results)
    if job.finetune is not None:
        _finetune(job, run, loaded, windows.finetuning)
        results["finetuned"] = steps.measure(run, loaded, windows.evaluation, "finetuned", job.common.split("test"))
        _save_results(run, plan, results)
    if results:
        _log_table(plan, results)
    steps.export(run, loaded, job.export)
    return loaded


def _load(job: PruneJob, run: Run, budget: Budget) -> tuple[LoadedModel, PruneWindows]:
    import torch

    torch.manual_seed(job.common.seed)
    logger.info(
        "budget: remove %s of the %s's %s parameters (ratio %s)",
        f"{budget.target:,}",
        budget.base_name,
        f"{budget.base:,}",
        job.prune.pruning_ratio,
    )
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        windows = job.windows(tokenizer)
        check_token_ids(job.source, "--base_model", *windows.all())
        check_exports(job.source, tokenizer, job.export, job.prune)
        loaded = load_model(job.source, dtype=job.common.dtype, device=job.common.device, tokenizer=tokenizer)
    return loaded, windows


def _decide(
    job: PruneJob, run: Run, loaded: LoadedModel, budget: Budget, importance: LayerImportance | None, windows: PruneWindows
) -> tuple[PruningPlan, check.Yardstick | None]:
    """The plan by the job's strategy: weights of layer scores, one ranking of all units, or the search, which also leaves a
    yardstick for what it healed."""
    scores, config = None if importance is None else importance.scores, job.prune
    if config.pruning_strategy == "search":
        return _search(job, run, loaded, budget, scores, windows)
    with run.stage("plan"):
        seed = job.common.seed
        units = score_units(loaded.runner, budget.geometry, config.importance, windows=windows.calibration, seed=seed)
        return steps.plan_by_scores(budget, config, scores, units), None


def _search(
    job: PruneJob, run: Run, loaded: LoadedModel, budget: Budget, scores: Sequence[float] | None, windows: PruneWindows
) -> tuple[PruningPlan, check.Yardstick]:
    from LLMPruner.importance.search.search import find_levels, prepare

    key, path, config = search_key(job), run.dir / SEARCH_FILE, job.prune
    state = SearchState.load(path, key, budget.sublayers) if config.resume else SearchState()

    def save(found: SearchState) -> None:
        if not job.dry_run:
            found.save(path, key)

    with run.stage("search"):
        deadline = time.monotonic() + 60 * config.search_minutes
        held_out = steps.search_text(loaded, windows.held_out, config, job.common)
        fitness = prepare(loaded.runner, budget, config, windows.calibration, held_out, seed=job.common.seed)
        limits = level_limits(budget, config, scores)
        find_levels(fitness, budget, config, limits=limits, state=state, save=save, deadline=deadline)
        plan = steps.plan_of_counts(budget, config, budget.kept(state.levels), fitness.database.scores)
        return plan, check.Yardstick.of(loaded.runner, held_out, state.fitness)


def _heal(job: PruneJob, run: Run, loaded: LoadedModel, plan: PruningPlan, text: torch.Tensor | None) -> None:
    """Slice the model to `plan` and heal it on `text` and, where asked for, on what it wrote before."""
    if job.writes:
        with run.stage("write"):
            text = steps.repair_text(text, steps.write_repair_text(loaded, job.prune, job.common), job.common)
    with run.stage(f"apply (repair {job.prune.repair})"):
        loaded.plan = plan
        steps.apply(loaded.runner, plan, text, job.prune, job.common)


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
    from LLMPruner.evaluator.plots import plot_plan

    run.describe({"base_model": job.source.path, **asdict(job.common), **asdict(job.prune)})
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
        "seed": job.common.seed,
        "versions": versions(),
        "parameters": loaded.plan.total_params,
        "calibration": {"corpus": job.prune.calibration_dataset, "split": job.common.split("train")} | written,
        "settings": asdict(job.prune),
    } | distilled


def _finetune(job: PruneJob, run: Run, loaded: LoadedModel, windows: torch.Tensor) -> None:
    base = run.dir / MODEL_FILE if job.save else job.source.path
    run.metrics["training"] = train_and_save(loaded, job.finetune, windows, run, seed=job.common.seed, save=job.save, base=base)


def _save_results(run: Run, plan: PruningPlan, results: dict[str, list[Perplexity]]) -> None:
    run.metrics["ppl"] = {role: [result.as_dict() for result in measured] for role, measured in results.items()}
    run.save_metrics()


def _log_table(plan: PruningPlan, results: dict[str, list[Perplexity]]) -> None:
    from LLMPruner.evaluator.table import comparison_table, tables_of

    parameters = {role: plan.geometry.dense_params if role == "original" else plan.total_params for role in results}
    logger.info("comparison\n%s", comparison_table(tables_of(results, parameters)))
