"""Export a checkpoint for other loaders: `python -m LLMPruner.export CHECKPOINT --format hf gguf padded --output DIR`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from LLMPruner import cli
from LLMPruner.checkpoint import require_free_space
from LLMPruner.config import EXPORT_FORMATS, ExportConfig
from LLMPruner.errors import UsageError
from LLMPruner.model import DTYPES, export_bytes, load_model, load_tokenizer, stored_dtype
from LLMPruner.run import check_export_places, existing_path, read_json_file, start_logging, stop_logging
from LLMPruner.source import ModelSource, find_model


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, load, write."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a .bin of these scripts, a Hugging Face directory, a .gguf file, or 'embedded'")
    parser.add_argument("--format", nargs="+", choices=list(EXPORT_FORMATS), default=["hf"], help="what to write")
    parser.add_argument("--output", required=True, help="folder for hf/, model.gguf and padded/")
    cli.add_gguf_flag(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of the weights; auto: as they are stored")
    args = parser.parse_args(argv)
    export = ExportConfig(tuple(args.format), args.gguf_type)
    folder = output_folder(args.output)
    source = find_model(args.checkpoint, "CHECKPOINT")
    check_export_places(export, folder, source.path)
    dtype = stored_dtype(source) if args.dtype == "auto" else args.dtype
    require_free_space(folder, export_bytes(source.geometry.dense_params, export, dtype, "cpu"), "the export")
    measured = measured_before(source)

    from LLMPruner.export.writer import check_export, write_exports

    handlers = start_logging()
    try:
        tokenizer = load_tokenizer(source)
        check_export(source, tokenizer, export)
        write_exports(load_model(source, dtype=dtype, device="cpu", tokenizer=tokenizer), export, folder, measured)
    finally:
        stop_logging(handlers)


def output_folder(path: str) -> Path:
    """The folder to write into, not yet created. Raises UsageError where none can be made."""
    folder = existing_path(path, "--output")
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not path or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--output {path!r} is not a folder, or none can be made there: choose another one")
    return folder


def measured_before(source: ModelSource) -> dict[str, Any]:
    """PPL results that are known of the model, by role: an export's own, or those of the run that wrote the `.bin`."""
    if source.kind != "bin":
        return source.provenance.get("measured") or {}
    roles, names = ("original", "pruned"), ["metrics.json"]
    if "finetune" in source.provenance:
        roles, names = ("original", "pruned", "finetuned", "before", "after"), ["metrics_finetune.json", "metrics.json"]
    for name in names:
        path = source.path.parent / name
        if path.is_file():
            metrics = read_json_file(path, "the run's metrics")
            found = metrics.get("ppl") if isinstance(metrics, dict) else None
            return {role: rows for role, rows in found.items() if role in roles} if isinstance(found, dict) else {}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
