"""Recovery after pruning: LoRA or full fine-tuning on transformers' Trainer, in place."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from LLMPruner.config import FinetuneConfig, LoraConfig
from LLMPruner.data import load_windows
from LLMPruner.errors import RunError
from LLMPruner.model import LoadedModel, save_model

if TYPE_CHECKING:
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
ADVICE = (
    "fine-tune with LoRA instead (--use_lora --lora_target_attention --lora_target_mlp --lr 2e-4), "
    "lower the learning rate, or use --dtype float32"
)


def recover(
    loaded: LoadedModel, config: FinetuneConfig, run: Run, *, data_dir: str | None, seed: int, save: bool
) -> dict[str, Any]:
    """Fine-tune `loaded` in place and write `pytorch_model_finetuned.bin` (and LoRA's `adapter/`) into the run's folder.

    Returns the training record. Raises RunError, with nothing written, when the loss is not finite.
    """
    adapter = run.dir / "adapter" if save and config.method == "lora" else None
    with run.stage(f"fine-tune ({config.method})") as record:
        windows = load_windows(
            loaded.tokenizer,
            config.dataset,
            "train",
            seq_len=config.seq_len,
            samples=config.samples,
            data_dir=data_dir,
            seed=seed,
        )
        record |= finetune(loaded, config, windows, seed=seed, adapter_dir=adapter)
    loaded.provenance["finetune"] = asdict(config) | {"split": "train", "seed": seed, "learning_rate": config.learning_rate}
    if save:
        with run.stage("save"):
            save_model(run.dir / "pytorch_model_finetuned.bin", loaded)
        logger.info("saved %s", run.dir / "pytorch_model_finetuned.bin")
    return record


def finetune(
    loaded: LoadedModel, config: FinetuneConfig, windows: torch.Tensor, *, seed: int, adapter_dir: Path | None = None
) -> dict[str, Any]:
    """Train `loaded.model` on packed windows `(n, seq_len)`, int64; every token but the first of a window is a target.

    LoRA adapters are saved to `adapter_dir` and merged, so the model is afterwards what it was, with other weights. Returns
    steps, trainable parameters, and the first and last logged loss (nats a token). Raises RunError on a non-finite loss.
    """
    model = loaded.model
    use_cache, model.config.use_cache = model.config.use_cache, False
    trained = add_adapters(model, config.lora, seed) if config.method == "lora" else model.requires_grad_(True)
    trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    logger.info("training %s of %s parameters", f"{trainable:,}", f"{sum(p.numel() for p in trained.parameters()):,}")
    progress = _Progress()
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(config, len(windows), folder, model.device, seed)
        trainer = _Trainer(
            model=trained, args=arguments, train_dataset=_Windows(windows), data_collator=_collate, callbacks=[progress]
        )
        trainer.remove_callback("PrinterCallback")
        trainer.train()
    if config.method == "lora":
        if adapter_dir is not None:
            _save_adapter(trained, adapter_dir)
        loaded.model = trained.merge_and_unload()
    loaded.model.config.use_cache = use_cache
    loaded.model.requires_grad_(False).eval()
    return {"steps": trainer.state.global_step, "trainable": trainable, "loss": [progress.losses[0], progress.losses[-1]]}


def add_adapters(model: torch.nn.Module, config: LoraConfig, seed: int) -> torch.nn.Module:
    """The model wrapped with fresh LoRA adapters (Hu et al. 2021); only they are trainable."""
    import peft

    torch.manual_seed(seed)
    targets = [*(ATTENTION_TARGETS if config.target_attention else ()), *(MLP_TARGETS if config.target_mlp else ())]
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, settings)


class _Trainer(Trainer):
    """Stops at the first loss that is not a number: going on would only ruin the weights for longer."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise RunError(f"the loss became {loss.item()} at step {self.state.global_step}: {ADVICE}")
        return result


class _Progress(TrainerCallback):
    """Plain log lines, and the losses in the order they were logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log a step, and stop where its gradient was not finite: the optimizer has then written NaN into the weights."""
        logs = logs or {}
        if "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        norm = float(logs.get("grad_norm", 0.0))
        if not math.isfinite(norm):
            raise RunError(f"the gradient norm became {norm} at step {state.global_step}: {ADVICE}")
        logger.info(
            "step %d of %d  loss %.4f  lr %.2e", state.global_step, state.max_steps, self.losses[-1], logs["learning_rate"]
        )


class _Windows(torch.utils.data.Dataset):
    def __init__(self, windows: torch.Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._windows[index]


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def _arguments(config: FinetuneConfig, count: int, folder: str, device: torch.device, seed: int) -> TrainingArguments:
    steps = max(1, math.ceil(math.ceil(count / config.batch_size) / config.grad_accum)) * config.epochs
    on_gpu = device.type == "cuda"
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=min(config.warmup_steps, steps // 10),  # a short run must not spend itself warming up
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 20),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=on_gpu,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        disable_tqdm=not sys.stderr.isatty(),
    )


def _save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write the adapter to a temporary sibling, then put it in place of an older one whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
