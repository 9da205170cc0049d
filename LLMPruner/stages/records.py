"""What a pruning run says of itself: in its log, in the files beside the model, and in the model's provenance."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.config import PLAN_FILE
from LLMPruner.files import write_text
from LLMPruner.importance.budget import Budget
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.plan import PruningPlan
from LLMPruner.run import versions
from LLMPruner.stages.forecast import log_size
from LLMPruner.stages.job import PruneJob

if TYPE_CHECKING:
    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")


def report_plan(run: Run, plan: PruningPlan, budget: Budget) -> None:
    """Log what every layer keeps and what is removed, and keep the counts among the run's metrics."""
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
    log_size(plan.total_params)
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


def decided(job: PruneJob, run: Run, plan: PruningPlan, budget: Budget, importance: LayerImportance | None) -> None:
    """Log the plan, and write what is decided so far."""
    report_plan(run, plan, budget)
    describe(job, run, plan, importance)


def describe(job: PruneJob, run: Run, plan: PruningPlan, importance: LayerImportance | None) -> None:
    """Write what is decided so far: settings, scores, plan, picture."""
    if not parallel.main():
        return
    from LLMPruner.evaluator.plots import plot_plan

    run.describe({"base_model": job.source.path, **asdict(job.common), **asdict(job.prune)})
    if importance is not None:
        importance.save(run.dir / "layer_importance_config.json")
    write_text(run.dir / PLAN_FILE, plan.to_json() + "\n")
    plot_plan(run.dir / "pruning_strategy.png", plan, None if importance is None else importance.scores)


def record(job: PruneJob, loaded: LoadedModel, command: str) -> None:
    """Put the provenance beside the weights; `command` is the one that began the run."""
    written = {"written": f"and {job.prune.self_samples} windows that the dense model wrote"} if job.writes else {}
    by_head = ("distill_model_epochs", "distill_last", "distill_labels")
    learned = {"distill_epochs": job.distills} | dict.fromkeys(by_head, job.distills_model)
    distilled = {name: getattr(job.prune, name) for name, so in learned.items() if so}
    loaded.provenance |= {
        "command": command,
        "seed": job.common.seed,
        "versions": versions(),
        "parameters": loaded.plan.total_params,
        "calibration": {"corpus": job.prune.calibration_dataset, "split": job.common.split("train")} | written,
        "settings": asdict(job.prune),
    } | distilled


def save_results(run: Run, results: dict[str, list[Perplexity]]) -> None:
    """Write what was measured so far."""
    run.metrics["ppl"] = {role: [result.as_dict() for result in measured] for role, measured in results.items()}
    run.save_metrics()


def log_table(plan: PruningPlan, results: dict[str, list[Perplexity]]) -> None:
    """Log the comparison table."""
    from LLMPruner.evaluator.table import comparison_table, tables_of

    parameters = {role: plan.geometry.dense_params if role == "original" else plan.total_params for role in results}
    logger.info("comparison\n%s", comparison_table(tables_of(results, parameters)))
