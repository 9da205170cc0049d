"""What the Trainer is told: its arguments, from the settings, the batch and the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from LLMPruner import parallel
from LLMPruner.trainer.batch import Batch
from LLMPruner.trainer.loss import Student
from LLMPruner.training_config import FinetuneConfig

if TYPE_CHECKING:
    from LLMPruner.data.training import TrainingText


def autocast_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """What products are computed in where that is not the weights' own; who asks for --dtype float32 gets no autocast."""
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def arguments(config: FinetuneConfig, steps: int, batch: Batch, folder: Path, student: Student, seed: int) -> dict[str, Any]:
    """The Trainer's arguments for a training of so many steps, by name."""
    device, precision = student.model.device, student.precision
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
        "save_total_limit": None,  # the Trainer would remove the old ones before the new one is whole: see checkpoints.py
        "report_to": "none",
        "seed": seed,
        "data_seed": seed,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": device.type == "cpu",
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,  # it knows the columns that `forward` names, and drops the teacher's answers
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def checks(text: TrainingText, *, first: bool) -> dict[str, Any]:
    """Arguments for looks at the held-out text, and for keeping the best state; `first`: there is one before the first step."""
    if not text.held_out:
        return {}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return {"eval_strategy": "steps", "eval_on_start": first, **best}


def training_arguments(values: dict[str, Any], device: torch.device) -> TrainingArguments:
    """Train where the model is: by itself the Trainer takes cuda:0, and copies the model to all GPUs (DataParallel)."""
    if "eval_strategy" in values:
        values |= {"eval_steps": values["save_steps"]}
    # A launcher's word for it would count where neither is asked for: here --dtype decides.
    os.environ["ACCELERATE_MIXED_PRECISION"] = next((name for name in ("bf16", "fp16") if values.get(name)), "no")
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if device.type == "cuda" and device.index and parallel.count() == 1:
        torch.cuda.set_device(device)
        arguments.distributed_state.device = device  # of accelerate
        vars(arguments)["_setup_devices"] = device  # the cached value of `arguments.device`
    return arguments
