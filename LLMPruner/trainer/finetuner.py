"""Recovery after pruning: LoRA or full fine-tuning, with or without a teacher, on transformers' Trainer, in place."""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from LLMPruner import parallel
from LLMPruner.config import FinetuneConfig
from LLMPruner.model.load import LoadedModel
from LLMPruner.model.rates import measure_rates
from LLMPruner.trainer.batch import Batch, choose_batch
from LLMPruner.trainer.checkpoints import KEPT, MarkWhole, last_checkpoint, read_weights, write_weights
from LLMPruner.trainer.loss import IGNORED, Student
from LLMPruner.trainer.progress import Bar, Pace, Progress, Watch
from LLMPruner.trainer.teacher import DrawnAnswers
from LLMPruner.trainer.trained import adapters, float32_weights, save_adapter, trainable, training_settings

if TYPE_CHECKING:
    from LLMPruner.data.training import TrainingRows, TrainingText

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
    was, with other weights. Returns method, steps, trainable parameters, learning rate, warm-up steps, the curves, and the
    first and last logged loss (nats a token). Raises RunError on a non-finite loss or gradient; a model under LoRA then has
    its old weights back.
    """
    model = loaded.model
    precision = _autocast(model)
    with ExitStack() as stack:
        if config.method == "lora":
            weights = adapters(model, loaded.plan.geometry.table, config.lora, seed)
        else:
            weights = float32_weights(model)
        trained = stack.enter_context(weights)
        folder = places.checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        student = Student(model, config.distill, teacher)
        count = sum(parameter.numel() for parameter in trainable(student).values())
        logger.info("training %s parameters of %s", f"{count:,}", f"{loaded.plan.total_params:,} in the model")
        batch = choose_batch(student, config, text.rows.windows, folder, precision)
        stack.enter_context(training_settings(model, recompute=batch.recompute))
        last = last_checkpoint(folder)
        if last is not None:
            logger.info("going on from %s", last)
        steps = config.steps(-(-len(text.rows.windows) // parallel.count()))
        arguments = _arguments(config, steps, batch, folder, model, seed) | _checks(text, resumed=last is not None)
        trainer = _trainer(student, config, text, _training_arguments(arguments, model.device), answers)
        _report(trainer, config, places, text.rows.windows.shape[1])
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # autocast replaces `forward`
        _warn_of_no_gain(trainer)
        if places.adapter is not None and parallel.main():
            save_adapter(trained, places.adapter, places.base)
    return _record(config, trainer, count)


def _warn_of_no_gain(trainer: Trainer) -> None:
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    if parallel.main() and losses and losses.get(0, float("inf")) <= min(losses.values()):
        logger.warning(
            "no state was better on held-out text than the model before training: lower the learning rate, or use other text"
        )


def _record(config: FinetuneConfig, trainer: Trainer, count: int) -> dict[str, Any]:
    """What a training says of itself, from the Trainer's history, which outlives an interruption."""
    history = trainer.state.log_history
    losses = [row for row in history if "loss" in row]
    checks = [{name: row[name] for name in row if name.startswith(("eval_", "step"))} for row in history if "eval_loss" in row]
    return {
        "method": config.method,
        "steps": trainer.state.global_step,
        "trainable_parameters": count,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup(trainer.state.max_steps),
        "loss_first": losses[0]["loss"],
        "loss_last": losses[-1]["loss"],
        "curve": [[row["step"], row["loss"]] for row in losses],
        "held_out": checks,
        "kept_step": trainer.state.best_global_step if trainer.state.best_model_checkpoint else trainer.state.global_step,
    }


def _trainer(
    student: Student, config: FinetuneConfig, text: TrainingText, arguments: TrainingArguments, answers: DrawnAnswers | None
) -> _Trainer:
    """A Trainer whose checks measure every held-out part."""
    held_out, offset = {}, len(text.rows.windows)
    for name, rows in text.held_out.items():
        held_out[name] = _Rows(rows, answers, offset)
        offset += len(rows.windows)
    trainer = _Trainer(
        model=student,
        args=arguments,
        train_dataset=_Rows(text.rows, answers),
        eval_dataset=held_out or None,
        data_collator=_collate,
    )
    trainer.weights = text.weights
    return trainer


def _report(trainer: _Trainer, config: FinetuneConfig, places: Places, seq_len: int) -> None:
    """Our own lines, bar and checks instead of the Trainer's."""
    arguments, student = trainer.args, trainer.model
    for plain in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(plain)
    tokens = config.windows_per_step * seq_len * parallel.count()
    kept = "" if places.checkpoints is None else f"; the last good state is kept in {places.checkpoints}"
    device, dtype = student.model.device, _autocast(student.model) or student.model.dtype
    peak = measure_rates(device, dtype, student.config.hidden_size).matmul
    pace = Pace(tokens, _token_flops(student, config), peak, parallel.count())
    callbacks: list[TrainerCallback] = [Progress(pace, device), Watch(arguments.save_steps, kept), MarkWhole()]
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


class _Rows(torch.utils.data.Dataset):
    """Windows with what is to be learned of them: labels, and the teacher's answers where they were drawn."""

    def __init__(self, rows: TrainingRows, answers: DrawnAnswers | None, offset: int = 0) -> None:
        self.rows, self.answers, self.offset = rows, answers, offset

    def __len__(self) -> int:
        return len(self.rows.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, learned = self.rows.windows[index], self.rows.targets[index]
        labels = torch.full_like(ids, IGNORED)
        labels[:-1] = torch.where(learned[1:], ids[1:], IGNORED)
        return {"input_ids": ids, "labels": labels} | ({} if self.answers is None else self.answers[self.offset + index])


def _collate(rows: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class _Trainer(Trainer):
    """Losses summed over a step's tokens, however many are computed at once; checks of each part; our checkpoints."""

    weights: Mapping[str, float]  # of the held-out parts in the loss that decides

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the step's tokens here, not by its batches

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, torch.Tensor]:
        """The batches of a step, and the tokens that all processes learn in it."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        count = torch.stack([batch["labels"].ne(IGNORED).sum() for batch in batches]).sum() if batches else torch.zeros(())
        return batches, self.accelerator.reduce(count.to(device).float(), "sum")

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """The batch's share of the step's mean loss a token; gradients are averaged over processes afterwards."""
        return model(**inputs)[0] / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean losses a token on each held-out part, and their mean as the parts are mixed."""
        model, metrics = self.model_wrapped, {}
        model.eval()
        for name, rows in self.eval_dataset.items():
            sums, tokens = torch.zeros(3, device=self.args.device), 0
            for place in range(0, len(rows), self.args.per_device_train_batch_size):
                batch = range(place, min(place + self.args.per_device_train_batch_size, len(rows)))
                inputs = self._prepare_inputs(_collate([rows[index] for index in batch]))
                with self.compute_loss_context_manager():
                    sums += model(**inputs)
                tokens += int(inputs["labels"].ne(IGNORED).sum())
            total, entropy, divergence = (sums / max(1, tokens)).tolist()
            metrics |= {f"eval_{name}_loss": total, f"eval_{name}_nll": entropy, f"eval_{name}_kl": divergence}
        shares = {name: self.weights[name] for name in self.eval_dataset}
        mean = sum(share * metrics[f"eval_{name}_loss"] for name, share in shares.items()) / sum(shares.values())
        metrics = {"eval_loss": mean, **metrics}
        parts = "; ".join(f"{name} {metrics[f'eval_{name}_nll']:.4f} nats" + _kl(metrics, name) for name in self.eval_dataset)
        logger.info("step %d  held-out loss %.4f: %s", self.state.global_step, mean, parts)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        write_weights(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("the best state is that of step %d", self.state.best_global_step)
        read_weights(self.model, Path(self.state.best_model_checkpoint))


def _kl(metrics: Mapping[str, float], name: str) -> str:
    divergence = metrics[f"eval_{name}_kl"]
    return f", KL {divergence:.4f}" if divergence else ""


def _autocast(model: torch.nn.Module) -> torch.dtype | None:
    """What products are computed in where that is not the weights' own; who asks for --dtype float32 gets no autocast."""
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _arguments(config: FinetuneConfig, steps: int, batch: Batch, folder: Path, model: Any, seed: int) -> dict[str, Any]:
    precision = _autocast(model)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch.windows,
        "gradient_accumulation_steps": config.windows_per_step // batch.windows,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "warmup_steps": config.warmup(steps),
        "lr_scheduler_type": "cosine",
        "optim": "adamw_bnb_8bit" if config.optimizer == "adamw_8bit" else "adamw_torch_fused",
        "logging_steps": config.log_every(steps),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.check_every(steps),
        "save_total_limit": KEPT,
        "report_to": "none",
        "seed": seed,
        "data_seed": seed,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": model.device.type == "cpu",
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": model.device.type == "cuda",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def _checks(text: TrainingText, *, resumed: bool) -> dict[str, Any]:
    """Arguments for a look at the held-out text before the first step and at every checkpoint, and for keeping the best one."""
    if not text.held_out:
        return {}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {"eval_strategy": "steps", "eval_on_start": not resumed, **best}


def _training_arguments(values: dict[str, Any], device: torch.device) -> TrainingArguments:
    """Train where the model is: by itself the Trainer takes cuda:0, and copies the model to all GPUs (DataParallel)."""
    if "eval_strategy" in values:
        values |= {"eval_steps": values["save_steps"]}
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if device.type == "cuda" and device.index and parallel.count() == 1:
        torch.cuda.set_device(device)
        arguments.distributed_state.device = device  # of accelerate
        vars(arguments)["_setup_devices"] = device  # the cached value of `arguments.device`
    return arguments
