"""All formats behind one function: where each goes, what is checked before, and the writing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import EXPORT_FORMATS, ExportConfig
from LLMPruner.export.card import check_beside, quantize_command
from LLMPruner.export.gguf import check_gguf, write_gguf
from LLMPruner.export.hf import write_hf, write_padded
from LLMPruner.export.layout import filled, is_stock, stock
from LLMPruner.plan import LayerPlan, PruningPlan

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.model.source import ModelSource

logger = logging.getLogger("LLMPruner")


def check_export(
    source: ModelSource, tokenizer: Any, export: ExportConfig, *, prunes: bool = False, adds_bias: bool = False
) -> None:
    """Raise UsageError where a wanted format cannot hold the model; no weights are needed.

    `prunes`: it is yet to be pruned; `adds_bias`: by a repair that gives what is pruned an output bias.
    """
    if "gguf" in export.formats:
        check_gguf(source.config, tokenizer, uniform=is_stock(source.plan) and not prunes)
    if "padded" in export.formats:
        stock(_with_biases(source.plan) if adds_bias else source.plan)


def _with_biases(plan: PruningPlan) -> PruningPlan:
    """A plan of the same widths in which some output projections of each kind have a bias that a repair added."""
    geometry = plan.geometry
    few = LayerPlan(tuple(range(max(1, geometry.num_kv_heads - 1))), tuple(range(geometry.intermediate_size - 1)))
    return PruningPlan(geometry, (*PruningPlan.dense(geometry).layers[:-1], few), output_bias=True)


def write_exports(loaded: LoadedModel, export: ExportConfig, folder: Path, measured: dict[str, Any]) -> list[Path]:
    """Write the formats into `folder`; `measured` are PPL results by role, for the cards. Returns the paths.

    Raises UsageError, with nothing written, where a GGUF's card or Modelfile would replace a file that no export wrote.
    """
    if "gguf" in export.formats:
        check_beside(folder / EXPORT_FORMATS["gguf"])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for form in export.formats:
        path = folder / EXPORT_FORMATS[form]
        if form == "gguf":
            write_gguf(path, loaded, export.gguf_type, measured)
        else:
            {"hf": write_hf, "padded": write_padded}[form](path, loaded, measured)
        files = [path] if path.is_file() else path.rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        layout = stock(loaded.plan) if form == "padded" else filled(loaded.plan)
        zeros = layout.total_params - loaded.plan.total_params
        note = f", {zeros:,} of its parameters are padding" if zeros else ""
        logger.info("exported %s: %.1f MB%s", os.fspath(path), size / 1e6, note)
        if form == "gguf" and export.gguf_type != "q8_0":
            logger.info("for 4 bits a weight, llama.cpp's own tool: %s", quantize_command(os.fspath(path)))
        written.append(path)
    return written
