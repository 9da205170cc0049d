"""Compare dense, pruned and fine-tuned models by perplexity over the same windows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from LLMPruner import cli
from LLMPruner.checkpoint import write_json
from LLMPruner.config import EvalConfig, RunConfig
from LLMPruner.data import check_corpus
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.report import LANGUAGES, ROLES, comparison_table, results_json, tables_of
from LLMPruner.model import ModelSource, check_seq_len, find_model
from LLMPruner.run import start_logging, stop_logging


def build_parser() -> argparse.ArgumentParser:
    """All flags of the evaluation script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--original_model", help="the dense model: Hugging Face directory, hub id, .gguf file, or 'embedded'")
    parser.add_argument("--pruned_model", help="the pruned model: pytorch_model.bin")
    parser.add_argument("--finetuned_model", help="the fine-tuned model: pytorch_model_finetuned.bin")
    parser.add_argument("--seq_len", type=int, default=EvalConfig().seq_len, help="tokens of an evaluation window")
    parser.add_argument("--save_results", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--table_lang", choices=sorted(LANGUAGES), default="zh", help="language of the table")
    cli.add_eval_flags(parser, seq_len_flag=None)
    cli.add_run_flags(parser)
    return parser


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure, print."""
    args = build_parser().parse_args(argv)
    evaluation, settings = cli.eval_config(args, args.seq_len), cli.run_config(args)
    paths = {role: getattr(args, f"{role}_model") for role in ROLES if getattr(args, f"{role}_model") is not None}
    if not paths:
        raise UsageError("nothing to evaluate: give --original_model, --pruned_model or --finetuned_model")
    if args.save_results is not None:
        cli.check_output_file(args.save_results, "--save_results")
    sources = {role: find_model(path, f"--{role}_model") for role, path in paths.items()}
    for source in sources.values():
        check_seq_len(source, "--seq_len", evaluation.seq_len)
    for name in evaluation.datasets:
        check_corpus(name, settings.data_dir, "test", evaluation.seq_len)
    handlers = start_logging()
    try:
        compare(sources, evaluation, settings, args.save_results, args.table_lang)
    finally:
        stop_logging(handlers)


def compare(
    sources: dict[str, ModelSource], evaluation: EvalConfig, settings: RunConfig, save_results: str | None, lang: str
) -> None:
    """Measure one model after the other over the same windows; print the table and write the JSON."""
    from LLMPruner.evaluator.ppl import load_eval_windows, measure
    from LLMPruner.model import load_model, load_tokenizer, resolve_device, resolve_dtype, versions

    results, parameters, windows = {}, {}, None
    for role, source in sources.items():
        tokenizer = load_tokenizer(source)
        mine = load_eval_windows(tokenizer, evaluation, settings.data_dir)
        if windows is not None and any(not mine[name].equal(windows[name]) for name in mine):
            raise UsageError(f"the tokenizer of {source.path} differs from the first model's: their PPL cannot be compared")
        windows = mine
        loaded = load_model(source, dtype=settings.dtype, device=settings.device, tokenizer=tokenizer)
        results[role] = measure(loaded.model, windows, role)
        parameters[role] = source.plan.total_params
        del loaded  # one model in memory at a time
    print(comparison_table(tables_of(results, parameters), lang))
    if save_results is not None:
        device = resolve_device(settings.device)
        environment = {
            "seq_len": evaluation.seq_len,
            "samples": evaluation.samples,
            "device": str(device),
            "dtype": str(resolve_dtype(settings.dtype, device)).removeprefix("torch."),
            "versions": versions(),
        }
        paths = {role: os.fspath(source.path) for role, source in sources.items()}
        write_json(Path(save_results), results_json(results, parameters, paths, **environment))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
