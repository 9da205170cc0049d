"""Recovery after pruning: LoRA or full fine-tuning, with or without a teacher, on transformers' Trainer, in place."""

from __future__ import annotations

import logging
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from LLMPruner import parallel
from LLMPruner.model.load import LoadedModel
from LLMPruner.model.rates import measure_rates
from LLMPruner.model.tokenizer import quiet_transformers
from LLMPruner.trainer.arguments import arguments, autocast_dtype, checks, training_arguments
from LLMPruner.trainer.batch import Batch, choose_batch
from LLMPruner.trainer.checkpoints import MarkWhole, last_checkpoint, step_of
from LLMPruner.trainer.loop import RecoveryTrainer, Rows, collate
from LLMPruner.trainer.loss import Student
from LLMPruner.trainer.progress import Bar, Pace, Progress, Watch
from LLMPruner.trainer.teacher import DrawnAnswers
from LLMPruner.trainer.trained import adapters, float32_weights, save_adapter, trainable, training_settings
from LLMPruner.training_config import FinetuneConfig

if TYPE_CHECKING:
    from LLMPruner.data.training import TrainingText

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Places:
    """Where a training keeps what it makes; None: nowhere."""

    checkpoints: Path | None = None  # a training that finds one there goes on from it
    adapter: Path | None = None
    curves: Path | None = None  # for TensorBoard
    base: Path | None = None  # the model that an adapter is for


def finetune(
    loaded: LoadedModel,
    config: FinetuneConfig,
    text: TrainingText,
    *,
    seed: int,
    places: Places = Places(),
    teacher: Any = None,
    answers: DrawnAnswers | None = None,
) -> dict[str, Any]:
    """Train `loaded.model` on packed windows; the state with the least loss on the text's held-out windows is kept.

    With distillation either `teacher`, a dense model beside the student, or its drawn `answers` to the text's windows and then
    to those held out, are given. LoRA adapters are saved to `places.adapter` and merged, so the model is afterwards what it
    was, with other weights. Returns method, steps, the step that it went on from or None, trainable parameters, learning rate,
    warm-up steps, the curves, and the first and last logged loss (nats a token). Raises RunError on a non-finite loss or
    gradient; a model under LoRA then has its old weights back.
    """
    model, precision = loaded.model, autocast_dtype(loaded.model)  # of the weights as loaded: training may widen them
    with quiet_transformers(), ExitStack() as stack:
        trained = stack.enter_context(_weights(loaded, config, seed))
        folder = places.checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        student = Student(model, config.distill, teacher, precision)
        count = sum(parameter.numel() for parameter in trainable(student).values())
        logger.info("training %s parameters of %s", f"{count:,}", f"{loaded.plan.total_params:,} in the model")
        last = last_checkpoint(folder)
        batch = choose_batch(student, config, text.rows.windows, folder)
        stack.enter_context(training_settings(model, recompute=batch.recompute))
        trainer = _trainer(student, config, text, answers, folder, batch, seed=seed, resumed=last is not None)
        _report(trainer, config, places)
        if last is not None:
            logger.info("going on from %s", last)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # autocast replaces `forward`
        student.beside = (None,)  # the Trainer refers to itself, and would keep the teacher and the moments
        trainer.accelerator.free_memory()
        _warn_of_no_gain(trainer)
        if places.adapter is not None and parallel.main():
            save_adapter(trained, places.adapter, places.base)
    return _record(config, trainer, count, None if last is None else step_of(last))


def _weights(loaded: LoadedModel, config: FinetuneConfig, seed: int) -> AbstractContextManager[torch.nn.Module]:
    if config.method == "lora":
        return adapters(loaded.model, loaded.plan.geometry.table, config.lora, seed)
    return float32_weights(loaded.model)


def _warn_of_no_gain(trainer: Trainer) -> None:
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    if parallel.main() and losses and losses.get(0, float("inf")) <= min(losses.values()):
        logger.warning(
            "no state was better on held-out text than the model before training: lower the learning rate, or use other text"
        )


def _record(config: FinetuneConfig, trainer: Trainer, count: int, resumed_at: int | None) -> dict[str, Any]:
    """What a training says of itself, from the Trainer's history, which outlives an interruption."""
    history = trainer.state.log_history
    losses = [row for row in history if "loss" in row]
    checks = [{name: row[name] for name in row if name.startswith(("eval_", "step"))} for row in history if "eval_loss" in row]
    return {
        "method": config.method,
        "steps": trainer.state.global_step,
        "resumed_at": resumed_at,
        "trainable_parameters": count,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup(trainer.state.max_steps),
        "loss_first": losses[0]["loss"],
        "loss_last": losses[-1]["loss"],
        "micro_batch": trainer.args.per_device_train_batch_size,
        "curve": [[row["step"], row["loss"]] for row in losses],
        "held_out": checks,
        "kept_step": trainer.state.best_global_step if trainer.state.best_model_checkpoint else trainer.state.global_step,
    }


def _trainer(
    student: Student,
    config: FinetuneConfig,
    text: TrainingText,
    answers: DrawnAnswers | None,
    folder: Path,
    batch: Batch,
    *,
    seed: int,
    resumed: bool,
) -> RecoveryTrainer:
    """A Trainer whose checks measure every held-out part."""
    windows, model = text.rows.windows, student.model
    held_out, offset = {}, len(windows)
    for name, rows in text.held_out.items():
        held_out[name] = Rows(rows, answers, offset)
        offset += len(rows.windows)
    mine = -(-len(windows) // parallel.count())
    looks = config.look_every(mine, offset - len(windows))
    values = arguments(config, config.steps(mine), batch, folder, student, seed)
    values |= checks(text, first=not resumed)
    trainer = RecoveryTrainer(
        model=student,
        args=training_arguments(values, model.device),
        train_dataset=Rows(text.rows, answers, multiple=1 if parallel.count() == 1 else parallel.count() * batch.windows),
        eval_dataset=held_out or None,
        data_collator=collate,
    )
    trainer.weights, trainer.looks = text.weights, looks
    return trainer


def _report(trainer: RecoveryTrainer, config: FinetuneConfig, places: Places) -> None:
    """Our own lines, bar and checks instead of the Trainer's."""
    student = trainer.model
    for plain in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(plain)
    kept = "" if places.checkpoints is None else f"; the last good state is kept in {places.checkpoints}"
    device, dtype = student.model.device, student.precision or student.model.dtype
    peak = measure_rates(device, dtype, student.config.hidden_size).matmul
    pace = Pace(lambda: trainer.computed, _token_flops(student, config), peak, parallel.count())
    callbacks: list[TrainerCallback] = [
        Progress(pace, device),
        Watch(trainer.args.save_steps, trainer.looks, kept, lambda: trainer.last),
        MarkWhole(),
    ]
    if sys.stderr.isatty() and parallel.main():
        callbacks.append(Bar())
    if config.report_to == "tensorboard" and places.curves is not None and parallel.main():
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(places.curves))))
    for callback in callbacks:
        trainer.add_callback(callback)


def _token_flops(student: Student, config: FinetuneConfig) -> float:
    """FLOPs of a token's way through all matrices and back; to the weights too where these are trained."""

    def matrices(model: torch.nn.Module) -> int:
        return sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))

    beside = student.beside[0]
    return (4 if config.method == "lora" else 6) * matrices(student.model) + 2 * (0 if beside is None else matrices(beside))
