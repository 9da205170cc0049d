"""The stages of recovery in order: load, teach, measure, train, save, measure again."""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.data.mixture import as_typed
from LLMPruner.data.windows import evaluation_windows
from LLMPruner.model.load import check_loads, load_model, load_tokenizer
from LLMPruner.model.source import check_token_ids
from LLMPruner.run import versions
from LLMPruner.stages import steps, teaching
from LLMPruner.stages.job import FINETUNED_FILE, MODEL_FILE, RecoverJob, check_exports
from LLMPruner.stages.journal import Journal, open_finetune_journal
from LLMPruner.training_config import FinetuneConfig

if TYPE_CHECKING:
    from LLMPruner.data.training import TrainingText
    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run
    from LLMPruner.trainer.teacher import DrawnAnswers

logger = logging.getLogger("LLMPruner")


def recover(job: RecoverJob, run: Run) -> LoadedModel:
    """Run all stages of `job` into the folder of `run`, but those that a run which is resumed has finished.

    Returns the fine-tuned model.
    """
    journal = open_finetune_journal(job, run.dir)
    journal.follow(run.stages)
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        tested = evaluation_windows(tokenizer, job.evaluation, job.common.data_dir) if job.measures else {}
        check_exports(job.source, tokenizer, job.export)
        check_loads(job.source)
        text = teaching.text(job.training, job.common, job.teacher, tokenizer, run.dir)
        check_token_ids(job.source, "--model_path", *tested.values(), *text.all())
        parallel.check_shares(text.rows.windows)
        journal.begin(text.fingerprint(), resumed=job.resume)
        journal.once("command", lambda: run.command)
    teacher, answers = _taught(job, run, journal, tokenizer, text)
    loaded = load_model(job.source, dtype=job.common.dtype, device=job.common.device, tokenizer=tokenizer)
    # An experiment that was pruned under the same name keeps the description and the metrics of its pruning.
    suffix = "_finetune" if (run.dir / MODEL_FILE).exists() else ""
    settings = {"model_path": job.source.path, **asdict(job.common), **asdict(job.training)}
    run.describe(settings, f"description{suffix}.txt")
    results, split = {}, job.common.split("test")
    if job.test_before:
        results["before"] = steps.measure_once(journal, run, loaded, tested, "before fine-tuning", split)
    base, seed = job.source.path, job.common.seed
    run.metrics["training"] = train_and_save(
        loaded, job.training, text, run, journal, seed=seed, save=job.save, base=base, teacher=teacher, answers=answers
    )
    del teacher
    gc.collect()  # and with it the teacher and what the optimizer knew
    if job.test_after:
        results["after"] = steps.measure_once(journal, run, loaded, tested, "after fine-tuning", split)
    _report(run, results, f"metrics{suffix}.json")
    steps.export(run, loaded, job.export, f"metrics{suffix}.json")
    journal.finish()
    return loaded


def _report(run: Run, results: dict[str, list[Perplexity]], file: str) -> None:
    """Write what was measured, and log what training changed."""
    run.metrics["ppl"] = {when: [result.as_dict() for result in measured] for when, measured in results.items()}
    run.save_metrics(file)
    for before, after in zip(results.get("before", ()), results.get("after", ()), strict=False):
        logger.info("PPL %s %s: %.4f -> %.4f", before.corpus, before.split, before.ppl, after.ppl)


def _taught(job: RecoverJob, run: Run, journal: Journal, tokenizer: Any, text: TrainingText) -> tuple[Any, DrawnAnswers | None]:
    """The teacher beside the student or its answers on disk, one of the two, where there is one."""
    if not job.training.distill.distill:
        return None, None
    teacher = teaching.Teacher(job.teacher, job.common, journal.work, tokenizer)
    if not teaching.caches(journal, job.teacher, job.training, job.common, job.source.plan.total_params):
        return teacher.whole().model, None
    with run.stage("teach"):
        answers = teaching.answers(journal, teacher.either, text, job.training, job.common.seed)
    teacher.drop()
    return None, answers


def train_and_save(
    loaded: LoadedModel,
    config: FinetuneConfig,
    text: TrainingText,
    run: Run,
    journal: Journal,
    *,
    seed: int,
    save: bool,
    base: Path,
    teacher: Any = None,
    answers: DrawnAnswers | None = None,
) -> dict[str, Any]:
    """Fine-tune `loaded` in place and write `pytorch_model_finetuned.bin` (and LoRA's `adapter/`) into the run's folder.

    `base` is the checkpoint that the weights come from, for the record. A training that was cut off goes on from its last
    checkpoint in the journal's folder. Returns the training record of `finetune`. Raises RunError, with nothing written but
    checkpoints, when the loss or its gradient is not finite.
    """
    from LLMPruner.trainer.curve import plot_training
    from LLMPruner.trainer.finetuner import Places, finetune

    places = Places(
        checkpoints=journal.work / "training",
        adapter=run.dir / "adapter" if save and config.method == "lora" else None,
        curves=run.timestamp_dir / "tensorboard",
        base=base,
    )
    with run.stage("train") as record:
        record |= finetune(loaded, config, text, seed=seed, places=places, teacher=teacher, answers=answers)
    loaded.provenance["finetune"] = _provenance(config, record, text, seed, base, journal.done.get("command", run.command))
    if parallel.main():
        plot_training(run.dir / "training.png", record["curve"], record["held_out"], record["kept_step"])
    if save:
        steps.save(run, loaded, FINETUNED_FILE)
    return record


def _provenance(
    config: FinetuneConfig, record: dict[str, Any], text: TrainingText, seed: int, base: Path, command: str
) -> dict[str, Any]:
    import peft

    left_out = ("prefix", "dataset", "lora", "distill", "report_to")
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    if config.method == "lora":
        settings["lora"] = asdict(config.lora)
    if config.distill.distill:
        settings["distill"] = asdict(config.distill)
    return settings | {
        "lr": config.learning_rate,
        "warmup_steps": record["warmup_steps"],
        "corpus": as_typed(config),
        "parts": text.weights,
        "split": "train",
        "windows": len(text.rows.windows),
        "kept_step": record["kept_step"],
        "seed": seed,
        "base_checkpoint": str(base),
        "command": command,
        "versions": versions() | {"peft": peft.__version__},
    }
