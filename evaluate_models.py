"""Compare dense, pruned and fine-tuned models by perplexity over the same windows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from LLMPruner import cli, parallel
from LLMPruner.config import EfficiencyConfig, EvalConfig, require_at_least
from LLMPruner.data.corpora import check_corpus
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.table import LANGUAGES, ROLES
from LLMPruner.files import check_output_file, write_json
from LLMPruner.model.source import ModelSource, check_seq_len, find_model
from LLMPruner.run import start_logging, stop_logging


def build_parser() -> argparse.ArgumentParser:
    """All flags of the evaluation script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--original_model", help="the dense model: Hugging Face directory, hub id, .gguf file, or 'embedded'")
    parser.add_argument("--pruned_model", help="the pruned model: pytorch_model.bin, or an exported directory")
    parser.add_argument("--finetuned_model", help="the fine-tuned model: pytorch_model_finetuned.bin, or an export")
    parser.add_argument("--seq_len", type=int, default=EvalConfig().seq_len, help="tokens of an evaluation window")
    parser.add_argument("--save_results", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--table_lang", choices=sorted(LANGUAGES), default="zh", help="language of the table")
    parser.add_argument("--efficiency", action="store_true", help="also measure size, FLOPs, KV cache, speed and memory")
    cli.add_settings(parser, EfficiencyConfig, "efficiency", prefix="efficiency_")
    cli.add_eval_flags(parser, seq_len=False)
    cli.add_common_flags(parser)
    return parser


def efficiency_config(args: argparse.Namespace, sources: Mapping[str, ModelSource]) -> EfficiencyConfig:
    """How speed is to be measured. Raises UsageError where the tokens do not fit a model's positions."""
    config = EfficiencyConfig(**cli.settings_of(EfficiencyConfig, args, "efficiency_"))
    for source in sources.values():
        check_seq_len(source, "--efficiency_prompt_tokens", config.prompt_tokens)
        check_seq_len(
            source, "--efficiency_new_tokens (and what is in the cache before)", config.decode_context + config.new_tokens
        )
    return config


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure, print."""
    args = build_parser().parse_args(argv)
    require_at_least("--seq_len", args.seq_len, 2)  # EvalConfig would call it --eval_seq_len
    evaluation, common = cli.eval_config(args, args.seq_len), cli.common_config(args)
    paths = {role: getattr(args, f"{role}_model") for role in ROLES if getattr(args, f"{role}_model") is not None}
    if not paths:
        raise UsageError("nothing to evaluate: give --original_model, --pruned_model or --finetuned_model")
    if args.save_results is not None:
        check_output_file(args.save_results, "--save_results")
    sources = {role: find_model(path, f"--{role}_model") for role, path in paths.items()}
    for source in sources.values():
        check_seq_len(source, "--seq_len", evaluation.seq_len)
    if args.efficiency and common.stream == "on":
        raise UsageError("--efficiency measures models in memory: run it without --stream on")
    if args.efficiency and parallel.count() > 1:
        raise UsageError("--efficiency measures one process: run it without the launcher")
    efficiency = efficiency_config(args, sources) if args.efficiency else None
    for name in evaluation.datasets:
        check_corpus(name, common.data_dir, "test", evaluation.seq_len, common.text_format)

    from LLMPruner.evaluator.compare import compare

    handlers = start_logging()
    try:
        record = compare(sources, evaluation, common, efficiency, args.table_lang)
    finally:
        stop_logging(handlers)
    if args.save_results is not None and parallel.main():
        write_json(Path(args.save_results), record)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
