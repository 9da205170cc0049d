"""Export a checkpoint for other loaders: `python -m LLMPruner.export CHECKPOINT --format hf gguf padded --output DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from LLMPruner import cli
from LLMPruner.config import EXPORT_FORMATS, ExportConfig
from LLMPruner.export import register
from LLMPruner.files import check_output_folder, read_json_file, require_free_space
from LLMPruner.model.device import DTYPES, dtype_name, resolve_device, resolve_dtype
from LLMPruner.model.load import load_model, load_tokenizer
from LLMPruner.model.size import export_bytes, stored_dtype
from LLMPruner.model.source import ModelSource, find_model
from LLMPruner.run import start_logging, stop_logging
from LLMPruner.stages.job import check_export_places


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, load, write."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", help="a .bin of these scripts, a Hugging Face directory, a .gguf file, or 'embedded'")
    parser.add_argument("--format", nargs="+", choices=list(EXPORT_FORMATS), default=["hf"], help="what to write")
    parser.add_argument("--output", required=True, help="folder for hf/, padded/ and model.gguf with its card and Modelfile")
    cli.add_gguf_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the weights; auto: as they are stored, of a GGUF that which pruning has here",
    )
    args = parser.parse_args(argv)
    export = ExportConfig(tuple(args.format), args.gguf_type)
    folder = check_output_folder(args.output, "--output")
    source = find_model(args.checkpoint, "CHECKPOINT")
    check_export_places(export, folder, source.path)
    dtype = precision(source) if args.dtype == "auto" else args.dtype
    require_free_space(folder, export_bytes(source.geometry.dense_params, export, dtype, "cpu"), "the export")
    measured = measured_before(source)

    from LLMPruner.export.writer import check_export, write_exports

    register()
    handlers = start_logging()
    try:
        tokenizer = load_tokenizer(source)
        check_export(source, tokenizer, export)
        write_exports(load_model(source, dtype=dtype, device="cpu", tokenizer=tokenizer), export, folder, measured)
    finally:
        stop_logging(handlers)


def precision(source: ModelSource) -> str:
    """The precision that the weights are stored in; of a GGUF, which is dequantized, the one that a `.bin` pruned from it on
    this machine has, so that exports of both compare."""
    if source.kind == "gguf":
        return dtype_name(resolve_dtype("auto", resolve_device("auto")))
    return stored_dtype(source)


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
