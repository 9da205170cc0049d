"""Compare any number of models by perplexity over the same windows, by tasks of lm-evaluation-harness, and by speed."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from LLMPruner import cli, parallel
from LLMPruner.config import EfficiencyConfig, EvalConfig, require_at_least
from LLMPruner.evaluator.engines import EngineConfig
from LLMPruner.evaluator.overview import FORMATS
from LLMPruner.evaluator.plots import PLOT_SUFFIXES
from LLMPruner.evaluator.table import LANGUAGES, ROLES
from LLMPruner.evaluator.tasks import TaskConfig
from LLMPruner.files import existing_path
from LLMPruner.run import start_logging, stop_logging
from LLMPruner.stages.evaluate import draw, evaluate, tell
from LLMPruner.stages.evaluation_job import EvaluationJob, check, find_models
from LLMPruner.stages.extras import Extras, GenerateConfig


def build_parser() -> argparse.ArgumentParser:
    """All flags of the evaluation script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--original_model", help="the dense model: Hugging Face directory, hub id, .gguf file, or 'embedded'")
    parser.add_argument("--pruned_model", help="the pruned model: pytorch_model.bin, or an exported directory")
    parser.add_argument("--finetuned_model", help="the fine-tuned model: pytorch_model_finetuned.bin, or an export")
    parser.add_argument(
        "--models", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="more models, each under a name"
    )
    parser.add_argument("--baseline", metavar="NAME", help="the others are compared to it; default: original, else the first")
    parser.add_argument("--seq_len", type=int, default=EvalConfig().seq_len, help="tokens of an evaluation window")
    parser.add_argument("--stride", type=int, help="tokens from window to window: only that many at each end count")
    parser.add_argument("--ppl", action=cli.Switch, default=True, help="measure perplexity")
    parser.add_argument("--save_results", metavar="FILE", help="write the results as JSON, after every measurement")
    parser.add_argument("--resume", action="store_true", help="measure only what the file of --save_results has not")
    parser.add_argument("--table_lang", choices=sorted(LANGUAGES), default="zh", help="language of tables and pictures")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table; but for text the log goes to stderr")
    parser.add_argument("--plot", metavar="FILE", help=f"draw the results, as {', '.join(PLOT_SUFFIXES)}")
    cli.add_settings(parser, TaskConfig, "tasks")
    parser.add_argument("--efficiency", action="store_true", help="also measure size, FLOPs, KV cache, speed and memory")
    cli.add_settings(parser, EfficiencyConfig, "efficiency", prefix="efficiency_")
    cli.add_settings(parser, EngineConfig, "engine")
    cli.add_settings(parser, GenerateConfig, "generation")
    cli.add_eval_flags(parser, seq_len=False)
    cli.add_common_flags(parser)
    return parser


def job_of(args: argparse.Namespace, argv: Sequence[str]) -> EvaluationJob:
    """What the flags ask for, its settings checked and its models found."""
    require_at_least("--seq_len", args.seq_len, 2)  # EvalConfig would call it --eval_seq_len
    ppl = replace(cli.eval_config(args, args.seq_len), stride=args.stride)
    tasks = cli.config_of(TaskConfig, args)
    efficiency = cli.config_of(EfficiencyConfig, args, "efficiency_")
    roles = {role: getattr(args, f"{role}_model") for role in ROLES if getattr(args, f"{role}_model") is not None}
    return EvaluationJob(
        find_models(roles, args.models),
        ppl=ppl if args.ppl else None,
        tasks=tasks if args.tasks else None,
        efficiency=efficiency if args.efficiency else None,
        extras=Extras(cli.config_of(GenerateConfig, args), cli.config_of(EngineConfig, args), efficiency),
        common=cli.common_config(args),
        baseline=args.baseline,
        results=None if args.save_results is None else existing_path(args.save_results, "--save_results"),
        plot=None if args.plot is None else existing_path(args.plot, "--plot"),
        resume=args.resume,
        command=shlex.join(["python", "evaluate_models.py", *argv]),
    )


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, measure, print, draw."""
    args = build_parser().parse_args(argv)
    job = job_of(args, argv)
    check(job)
    with contextlib.redirect_stdout(sys.stdout if args.format == "text" else sys.stderr):  # what a pipe reads is the table
        handlers = start_logging()
        try:
            evaluation = evaluate(job)
        finally:
            stop_logging(handlers)
    if parallel.main():
        tell(evaluation, args.format, args.table_lang)
        if job.plot is not None:
            draw(job.plot, evaluation, args.table_lang)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
