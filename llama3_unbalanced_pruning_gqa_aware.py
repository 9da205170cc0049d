"""Prune a Llama with grouped-query attention: whole KV groups and MLP channels, more where layers matter less."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from LLMPruner import cli, parallel
from LLMPruner.config import PRESETS
from LLMPruner.errors import UsageError
from LLMPruner.model.source import find_model
from LLMPruner.run import Run, check_experiment
from LLMPruner.stages.forecast import dry_run
from LLMPruner.stages.job import PruneJob, check_prune
from LLMPruner.stages.journal import open_journal
from LLMPruner.stages.prune import prune


def build_parser() -> argparse.ArgumentParser:
    """All flags of the pruning script."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--base_model", help="Hugging Face directory, hub id or .gguf file; default: the embedded SmolLM2-135M")
    parser.add_argument("--save_ckpt_log_name", required=True, help="experiment name: results go to prune_log/NAME")
    parser.add_argument("--save_model", action=cli.Switch, default=True, help="write pytorch_model.bin")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the sizes and a forecast of time and memory, write nothing but the log; a config.json is enough",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run of this experiment")
    parser.add_argument("--test_original_ppl", action=cli.Switch, default=False, help="measure the dense model's PPL first")
    parser.add_argument("--test_after_prune", action=cli.Switch, default=False, help="measure the PPL after pruning")
    parser.add_argument("--finetune", action=cli.Switch, default=False, help="fine-tune after pruning")
    parser.add_argument("--finetune_method", choices=("lora", "full"), default="lora", help="how to fine-tune")
    cli.add_prune_flags(parser)
    cli.add_eval_flags(parser)
    cli.add_training_flags(parser, "finetune_")
    cli.add_lora_flags(parser)
    cli.add_export_flags(parser)
    cli.add_common_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a preset only moves defaults, so that an explicit flag wins."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.preset is not None:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    return args


def build_job(args: argparse.Namespace) -> PruneJob:
    """Check the flags and inspect the model; no weights are read."""
    config = cli.prune_config(args)
    finetune = cli.finetune_config(args, "finetune_", args.finetune_method)
    if args.distill and not args.finetune:
        raise UsageError("--distill is a way to fine-tune: add --finetune")
    if args.teacher is not None:
        raise UsageError("--teacher is for test_finetuning.py: here the model that is pruned is the teacher")
    return PruneJob(
        prune=config,
        common=cli.common_config(args),
        evaluation=cli.eval_config(args, args.eval_seq_len),
        finetune=finetune if args.finetune else None,
        export=cli.export_config(args),
        save=args.save_model,
        test_original=args.test_original_ppl,
        test_pruned=args.test_after_prune,
        dry_run=args.dry_run,
        resume=args.resume,
        source=find_model(args.base_model, "--base_model", config_alone=args.dry_run),
    )


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, run."""
    args = parse(argv)
    folder = check_experiment(args.save_ckpt_log_name, "--save_ckpt_log_name")
    job = build_job(args)
    budget, importance = check_prune(job, folder)
    if job.resume and not job.dry_run and (journal := open_journal(job, folder)).finished:
        journal.clear()
        if parallel.main():
            print(f"{folder} is finished: there is nothing left to do")
        return
    with Run(folder, __file__, argv, seed=job.common.seed, device=job.common.device, dry_run=job.dry_run) as run:
        if job.dry_run:
            dry_run(job, run, budget)
        else:
            prune(job, run, budget, importance)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv, shared=True)


if __name__ == "__main__":
    sys.exit(main())
