"""Recover a pruned model's quality with LoRA or full fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner import cli
from LLMPruner.checkpoint import require_free_space
from LLMPruner.config import EvalConfig, ExportConfig, FinetuneConfig, RunConfig
from LLMPruner.data import check_corpus
from LLMPruner.errors import UsageError
from LLMPruner.job import check_exports
from LLMPruner.model import checkpoint_bytes, export_bytes
from LLMPruner.pipeline import export_model
from LLMPruner.run import Run, check_experiment, check_export_places, logger
from LLMPruner.source import ModelSource, check_seq_len, check_token_ids, find_model

if TYPE_CHECKING:
    from LLMPruner.evaluator.ppl import Perplexity


@dataclass(frozen=True)
class Job:
    """Everything one fine-tuning run was asked for."""

    source: ModelSource
    training: FinetuneConfig
    evaluation: EvalConfig
    run: RunConfig
    test_before: bool
    test_after: bool
    save: bool
    export: ExportConfig


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
    cli.add_export_flags(parser)
    cli.add_run_flags(parser)
    return parser


def build_job(args: argparse.Namespace) -> Job:
    """Check the flags and inspect the model; no weights are read."""
    return Job(
        training=cli.finetune_config(args, "", "lora" if args.use_lora else "full"),
        evaluation=cli.eval_config(args, args.seq_len),
        run=cli.run_config(args),
        test_before=args.test_before,
        test_after=args.test_after,
        save=args.save_model,
        export=cli.export_config(args),
        source=find_model(args.model_path, "--model_path"),
    )


def preflight(job: Job, folder: Path) -> None:
    """All checks that need no weights. Raises UsageError, with nothing changed on disk."""
    seq_len, data_dir = job.training.seq_len, job.run.data_dir
    check_seq_len(job.source, "--seq_len", seq_len)
    check_corpus(job.training.dataset, data_dir, "train", seq_len)
    if job.test_before or job.test_after:
        for name in job.evaluation.datasets:
            check_corpus(name, data_dir, "test", seq_len)
    if job.save:
        output = folder / "pytorch_model_finetuned.bin"
        if output.exists() and output.samefile(job.source.path):
            raise UsageError(f"--save_name {folder.name} would overwrite the input {job.source.path}: choose another name")
    size = export_bytes(job.source.geometry.dense_params, job.export, job.run.dtype, job.run.device)
    if job.save:
        size += checkpoint_bytes(job.source.plan.total_params, job.run.dtype, job.run.device)
    check_export_places(job.export, folder, job.source.path)
    require_free_space(folder, size, "what the run writes")


def train(job: Job, run: Run) -> None:
    """Load, measure, train, save, measure again."""
    from LLMPruner.evaluator.ppl import load_eval_windows
    from LLMPruner.model import load_model, load_tokenizer
    from LLMPruner.trainer.finetuner import train_and_save, training_windows

    seed, data_dir = job.run.seed, job.run.data_dir
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        windows = training_windows(tokenizer, job.training, data_dir, seed)
        tested = load_eval_windows(tokenizer, job.evaluation, data_dir) if job.test_before or job.test_after else {}
        check_token_ids(job.source, "--model_path", windows, *tested.values())
        check_exports(job.source, tokenizer, job.export)
        loaded = load_model(job.source, dtype=job.run.dtype, device=job.run.device, tokenizer=tokenizer)
    # An experiment that was pruned under the same name keeps the description and the metrics of its pruning.
    suffix = "_finetune" if (run.dir / "pytorch_model.bin").exists() else ""
    settings = {"model_path": job.source.path, **asdict(job.run), **asdict(job.training)}
    run.describe(settings, f"description{suffix}.txt")
    results: dict[str, list[Perplexity]] = {}
    if job.test_before:
        results["before"] = evaluate(run, loaded.model, tested, "before fine-tuning")
    run.metrics["training"] = train_and_save(loaded, job.training, windows, run, seed=seed, save=job.save, base=job.source.path)
    if job.test_after:
        results["after"] = evaluate(run, loaded.model, tested, "after fine-tuning")
    run.metrics["ppl"] = {when: [result.as_dict() for result in measured] for when, measured in results.items()}
    run.save_metrics(f"metrics{suffix}.json")
    for before, after in zip(results.get("before", ()), results.get("after", ()), strict=False):
        logger.info("PPL %s %s: %.4f -> %.4f", before.corpus, before.split, before.ppl, after.ppl)
    export_model(run, loaded, job.export, f"metrics{suffix}.json")


def evaluate(run: Run, model, windows: dict, label: str) -> list[Perplexity]:
    """PPL on every corpus, as a stage of the run."""
    from LLMPruner.evaluator.ppl import measure

    with run.stage("evaluate"):
        return measure(model, windows, label)


def recipe(argv: Sequence[str]) -> None:
    """Parse, check, run."""
    args = build_parser().parse_args(argv)
    folder = check_experiment(args.save_name, "--save_name")
    job = build_job(args)
    preflight(job, folder)
    with Run(folder, __file__, argv, seed=job.run.seed) as run:
        train(job, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
