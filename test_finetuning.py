"""Recover a pruned model's quality with LoRA or full fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from LLMPruner import cli
from LLMPruner.checkpoint import require_free_space
from LLMPruner.config import EvalConfig, FinetuneConfig, RunConfig
from LLMPruner.data import check_corpus
from LLMPruner.model import ModelSource, check_seq_len, checkpoint_bytes, find_model
from LLMPruner.run import Run, check_experiment


def build_parser() -> argparse.ArgumentParser:
    """All flags of the fine-tuning script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a .bin of these scripts, or a Hugging Face directory")
    parser.add_argument("--save_name", required=True, help="experiment name: results go to prune_log/NAME")
    parser.add_argument("--use_lora", action=cli.Switch, default=False, help="LoRA instead of full fine-tuning")
    parser.add_argument("--save_model", action=cli.Switch, default=True, help="write pytorch_model_finetuned.bin")
    parser.add_argument("--test_before", action=cli.Switch, default=False, help="measure PPL before training")
    parser.add_argument("--test_after", action=cli.Switch, default=False, help="measure PPL after training")
    cli.add_training_flags(parser, "")
    cli.add_lora_flags(parser)
    cli.add_eval_flags(parser, seq_len_flag=None)
    cli.add_run_flags(parser)
    return parser


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, run."""
    args = build_parser().parse_args(argv)
    config = cli.finetune_config(args, "", "lora" if args.use_lora else "full")
    evaluation = cli.eval_config(args, args.seq_len)
    settings = cli.run_config(args)
    folder = check_experiment(args.save_name, "--save_name")
    source = find_model(args.model_path, "--model_path")
    check_seq_len(source, "--seq_len", config.seq_len)
    check_corpus(config.dataset, settings.data_dir, "train", config.seq_len)
    if args.test_before or args.test_after:
        for name in evaluation.datasets:
            check_corpus(name, settings.data_dir, "test", config.seq_len)
    if args.save_model:
        require_free_space(folder, checkpoint_bytes(source.plan.total_params, settings.dtype), "the checkpoint")
    with Run(folder, __file__, argv, seed=settings.seed) as run:
        train(run, source, config, evaluation, settings, args)


def train(
    run: Run, source: ModelSource, config: FinetuneConfig, evaluation: EvalConfig, settings: RunConfig, args: argparse.Namespace
) -> None:
    """Load, measure, train, save, measure again."""
    from LLMPruner.evaluator.ppl import load_eval_windows, measure
    from LLMPruner.model import load_model, load_tokenizer
    from LLMPruner.trainer.finetuner import recover

    measured = {}
    with run.stage("load"):
        tokenizer = load_tokenizer(source)
        windows = load_eval_windows(tokenizer, evaluation, settings.data_dir) if args.test_before or args.test_after else {}
        loaded = load_model(source, dtype=settings.dtype, device=settings.device, tokenizer=tokenizer)
    run.describe({"model_path": source.path, **asdict(settings), **asdict(config)})
    if args.test_before:
        with run.stage("evaluate before"):
            measured["before"] = measure(loaded.model, windows, "before fine-tuning")
    run.metrics["training"] = recover(loaded, config, run, data_dir=settings.data_dir, seed=settings.seed, save=args.save_model)
    if args.test_after:
        with run.stage("evaluate after"):
            measured["after"] = measure(loaded.model, windows, "after fine-tuning")
    run.metrics["ppl"] = {label: [result.as_dict() for result in results] for label, results in measured.items()}
    run.save_metrics("metrics_finetune.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
