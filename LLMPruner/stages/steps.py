"""Steps that pruning and recovery share, each a stage of a run: measure, save, export."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from LLMPruner.config import ExportConfig

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")


def measure(run: Run, loaded: LoadedModel, windows: dict[str, torch.Tensor], label: str) -> list[Perplexity]:
    """PPL on every corpus of `windows`, by name."""
    from LLMPruner.evaluator.ppl import measure as measure_ppl

    with run.stage(f"evaluate {label}") as record:
        results = measure_ppl(loaded.model, windows, label)
        record["ppl"] = [result.as_dict() for result in results]
    return results


def save(run: Run, loaded: LoadedModel, name: str) -> None:
    """Write the model as `name` into the run's folder."""
    from LLMPruner.model.load import save_model

    with run.stage("save"):
        save_model(run.dir / name, loaded)
    logger.info("saved %s", run.dir / name)


def export(run: Run, loaded: LoadedModel, wanted: ExportConfig, metrics: str = "metrics.json") -> None:
    """Write the model's exports into the run's folder, with the PPL that the run measured on their cards."""
    if not wanted.formats:
        return
    from LLMPruner.export.writer import write_exports

    with run.stage("export"):
        write_exports(loaded, wanted, run.dir, run.metrics.get("ppl", {}))
    run.save_metrics(metrics)
