"""The stages of a run, each a function of its inputs: called alike by the scripts, by the tests and by `benchmarks/`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.config import DISTILLATION, CommonConfig, ExportConfig, PruneConfig
from LLMPruner.data.windows import bos_token, interleaved, mixed
from LLMPruner.importance.allocation import allocate, keep_best_units
from LLMPruner.importance.budget import Budget, adds_bias
from LLMPruner.importance.criteria import UnitScores
from LLMPruner.importance.layer_analyzer import LayerImportance, analyze_layers
from LLMPruner.plan import PruningPlan
from LLMPruner.stages.job import PruneJob

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.forward import LayerRunner
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run
    from LLMPruner.stages.journal import Journal

logger = logging.getLogger("LLMPruner")


def score_layers(runner: LayerRunner, windows: torch.Tensor, job: PruneJob) -> LayerImportance:
    """One score per layer, on `windows` `(n, seq_len)`, with its provenance."""
    return analyze_layers(
        runner,
        windows,
        job.prune.layer_importance_method,
        corpus=job.prune.calibration_dataset,
        split=job.common.split("train"),
        seed=job.common.seed,
        fingerprint=job.source.fingerprint(),
    )


def plan_by_scores(
    budget: Budget, config: PruneConfig, layer_scores: Sequence[float] | None, units: Sequence[UnitScores]
) -> PruningPlan:
    """Split the budget over the layers by their scores, and keep the best units of each."""
    return plan_of_counts(budget, config, allocate(budget, layer_scores, config, units), units)


def plan_of_counts(
    budget: Budget, config: PruneConfig, kept: dict[tuple[int, str], int], units: Sequence[UnitScores]
) -> PruningPlan:
    """The plan that keeps so many units of each sublayer, by `(layer, sublayer)`: the best ones."""
    return keep_best_units(budget.geometry, kept, units, output_bias=adds_bias(config))


def write_repair_text(loaded: LoadedModel, config: PruneConfig, common: CommonConfig) -> torch.Tensor:
    """Windows for the repair that the model, still dense, writes itself."""
    from LLMPruner.data.self_text import write_windows

    count, seq_len = config.self_samples, config.calibration_seq_len
    bos = bos_token(loaded.tokenizer, config.calibration_bos)
    return write_windows(loaded.model, loaded.tokenizer, samples=count, seq_len=seq_len, seed=common.seed, bos=bos)


def repair_text(corpus: torch.Tensor, written: torch.Tensor, common: CommonConfig) -> torch.Tensor:
    """The repair's windows: those of the corpus and those the dense model wrote, in random order."""
    return mixed(corpus, written, seed=common.seed)


def search_text(loaded: LoadedModel, held_out: torch.Tensor, config: PruneConfig, common: CommonConfig) -> torch.Tensor:
    """The search's windows: `held_out` of the corpus, and others that the model, still dense, writes itself."""
    count = min(config.search_windows[1], len(held_out))  # no more than the corpus has, however many tokens are asked for
    if count == 0:
        return held_out
    from LLMPruner.data.self_text import write_windows

    seed = common.seed + 1  # not what the repair is fitted on
    settings = {"seq_len": held_out.shape[1], "bos": bos_token(loaded.tokenizer, config.calibration_bos)}
    written = write_windows(loaded.model, loaded.tokenizer, samples=count, seed=seed, **settings)
    return interleaved(held_out, written, seed=common.seed)


def apply(runner: LayerRunner, plan: PruningPlan, text: torch.Tensor | None, config: PruneConfig, common: CommonConfig) -> None:
    """Slice the runner's model to `plan` and heal it on `text` `(n, seq_len)`, in place."""
    from LLMPruner.methods.apply import apply_plan

    distillation = {name: getattr(config, name) for name in DISTILLATION}
    apply_plan(runner, plan, repair=config.repair, windows=text, seed=common.seed, **distillation)


def measure(
    run: Run, loaded: LoadedModel, windows: dict[str, torch.Tensor], label: str, split: str = "test"
) -> list[Perplexity]:
    """PPL on every corpus of `windows`, by name; `split` is what the record says that they are of."""
    from LLMPruner.evaluator.ppl import measure as measure_ppl

    with run.stage(f"evaluate {label}") as record:
        results = measure_ppl(loaded.runner, windows, label, split)
        record["ppl"] = [result.as_dict() for result in results]
    return results


def measure_once(
    journal: Journal, run: Run, loaded: LoadedModel, windows: dict[str, torch.Tensor], label: str, split: str
) -> list[Perplexity]:
    """`measure`, but what a run that is continued has measured already."""
    from LLMPruner.evaluator.ppl import Perplexity

    return journal.once(
        f"PPL {label}",
        lambda: measure(run, loaded, windows, label, split),
        dump=lambda results: [result.as_dict() for result in results],
        load=lambda rows: [Perplexity.of(row) for row in rows],
    )


def save(run: Run, loaded: LoadedModel, name: str) -> None:
    """Write the model as `name` into the run's folder."""
    if not parallel.main():
        return
    from LLMPruner.model.load import save_model

    with run.stage("save"):
        save_model(run.dir / name, loaded)
    logger.info("saved %s", run.dir / name)


def export(run: Run, loaded: LoadedModel, wanted: ExportConfig, metrics: str = "metrics.json") -> None:
    """Write the model's exports into the run's folder, with the PPL that the run measured on their cards."""
    if not wanted.formats or not parallel.main():
        return
    from LLMPruner.export.writer import write_exports

    with run.stage("export"):
        write_exports(loaded, wanted, run.dir, run.metrics.get("ppl", {}))
    run.save_metrics(metrics)
