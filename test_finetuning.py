"""Recover a pruned model's quality with LoRA or full fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from LLMPruner import cli, parallel
from LLMPruner.model.source import find_model
from LLMPruner.run import Run, check_experiment
from LLMPruner.stages.job import RecoverJob, check_recover
from LLMPruner.stages.journal import open_finetune_journal
from LLMPruner.stages.recover import recover
from LLMPruner.stages.teaching import find_teacher


def build_parser() -> argparse.ArgumentParser:
    """All flags of the fine-tuning script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="a .bin of these scripts, or a Hugging Face directory")
    parser.add_argument("--save_name", required=True, help="experiment name: results go to prune_log/NAME")
    parser.add_argument("--use_lora", action=cli.Switch, default=False, help="LoRA instead of full fine-tuning")
    parser.add_argument("--save_model", action=cli.Switch, default=True, help="write pytorch_model_finetuned.bin")
    parser.add_argument("--test_before", action=cli.Switch, default=False, help="measure PPL before training")
    parser.add_argument("--test_after", action=cli.Switch, default=False, help="measure PPL after training")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted training of this name")
    cli.add_training_flags(parser, "")
    cli.add_lora_flags(parser)
    cli.add_eval_flags(parser, seq_len=False)
    cli.add_export_flags(parser)
    cli.add_common_flags(parser)
    return parser


def build_job(args: argparse.Namespace) -> RecoverJob:
    """Check the flags and inspect the model; no weights are read."""
    training = cli.finetune_config(args, "", "lora" if args.use_lora else "full")
    source = find_model(args.model_path, "--model_path")
    return RecoverJob(
        training=training,
        evaluation=cli.eval_config(args, args.seq_len),
        common=cli.common_config(args),
        test_before=args.test_before,
        test_after=args.test_after,
        save=args.save_model,
        export=cli.export_config(args),
        source=source,
        teacher=find_teacher(source, training),
        resume=args.resume,
    )


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, run."""
    args = build_parser().parse_args(argv)
    folder = check_experiment(args.save_name, "--save_name")
    job = build_job(args)
    check_recover(job, folder)
    if job.resume and (journal := open_finetune_journal(job, folder)).finished:
        journal.clear()
        if parallel.main():
            print(f"{folder} is finished: there is nothing left to do")
        return
    with Run(folder, __file__, argv, seed=job.common.seed, device=job.common.device) as run:
        recover(job, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
