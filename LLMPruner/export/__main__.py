"""Export a checkpoint for other loaders: `python -m LLMPruner.export CHECKPOINT --format hf gguf padded --output DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from LLMPruner import cli
from LLMPruner.checkpoint import require_free_space
from LLMPruner.config import EXPORT_FORMATS, ExportConfig
from LLMPruner.errors import UsageError
from LLMPruner.model import checkpoint_bytes, load_model, load_tokenizer
from LLMPruner.run import existing_path, read_json_file, start_logging, stop_logging
from LLMPruner.source import ModelSource, find_model


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, load, write."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a .bin of these scripts, a Hugging Face directory, a .gguf file, or 'embedded'")
    parser.add_argument("--format", nargs="+", choices=list(EXPORT_FORMATS), default=["hf"], help="what to write")
    parser.add_argument("--output", required=True, help="folder for hf/, model.gguf and padded/")
    cli.add_gguf_flag(parser)
    cli.add_run_flags(parser)
    args = parser.parse_args(argv)
    export, settings = ExportConfig(tuple(args.format), args.gguf_type), cli.run_config(args)
    folder = existing_path(args.output, "--output")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {args.output} is not a folder")
    source = find_model(args.checkpoint, "CHECKPOINT")
    for form in export.formats:
        place = folder / EXPORT_FORMATS[form]
        if place.exists() and place.samefile(source.path):
            raise UsageError(f"--output {args.output} would replace {args.checkpoint}, which is read: choose another folder")
    size = checkpoint_bytes(source.geometry.dense_params, settings.dtype, settings.device)
    require_free_space(folder, size * len(export.formats), "the export")

    from LLMPruner.export.writer import check_export, write_exports

    handlers = start_logging()
    try:
        loaded = load_model(source, dtype=settings.dtype, device=settings.device, tokenizer=load_tokenizer(source))
        check_export(loaded, export, folder)
        write_exports(loaded, export, folder, measured_beside(source))
    finally:
        stop_logging(handlers)


def measured_beside(source: ModelSource) -> dict[str, Any]:
    """PPL that the run which wrote the checkpoint measured, by role; empty where it left no record."""
    names = ("metrics_finetune.json", "metrics.json") if "finetuned" in source.path.name else ("metrics.json",)
    for name in names:
        path = source.path.parent / name
        if path.is_file():
            metrics = read_json_file(path, "metrics")
            return metrics.get("ppl", {}) if isinstance(metrics, dict) else {}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
