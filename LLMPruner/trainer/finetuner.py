"""Recovery after pruning: LoRA or full fine-tuning on transformers' Trainer, in place."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from LLMPruner.config import FinetuneConfig, LoraConfig
from LLMPruner.errors import RunError
from LLMPruner.families.family import Family
from LLMPruner.files import write_folder_atomically
from LLMPruner.model.load import LoadedModel

logger = logging.getLogger("LLMPruner")

ADVICE = "use LoRA (--use_lora --lora_target_attention --lora_target_mlp --lr 2e-4), a lower learning rate, or --dtype float32"


def finetune(
    loaded: LoadedModel,
    config: FinetuneConfig,
    windows: torch.Tensor,
    *,
    seed: int,
    adapter_dir: Path | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Train `loaded.model` on packed windows `(n, seq_len)`, int64; every token but the first of a window is a target.

    LoRA adapters are saved to `adapter_dir`, naming `base` as their model, and merged, so the model is afterwards what it
    was, with other weights. Returns method, steps, trainable parameters, learning rate, warm-up steps, and the first and last
    logged loss (nats a token). Raises RunError on a non-finite loss or gradient; a model under LoRA then has its old weights
    back.
    """
    model, table = loaded.model, loaded.plan.geometry.table
    weights = adapters(model, table, config.lora, seed) if config.method == "lora" else float32_weights(model)
    precision = model.dtype  # of the weights as loaded
    with _training_settings(model), weights as trained:
        trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        logger.info("training %s parameters of %s", f"{trainable:,}", f"{loaded.plan.total_params:,} in the model")
        steps, losses = _train(trained, config, windows, precision, seed)
        if adapter_dir is not None:
            _save_adapter(trained, adapter_dir, base)
    return {
        "method": config.method,
        "steps": steps,
        "trainable_parameters": trainable,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup(_steps(config, len(windows))),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


@contextmanager
def adapters(model: torch.nn.Module, table: Family, config: LoraConfig, seed: int) -> Iterator[torch.nn.Module]:
    """Fresh LoRA adapters (Hu et al. 2021) on `model`, the only trainable parameters, float32 whatever the model's dtype.

    On leaving they are merged into the weights; after an exception they are dropped. `model` is then plain again.
    """
    import peft

    torch.manual_seed(seed)
    wanted = {"attention": config.target_attention, "mlp": config.target_mlp}
    targets = [part.name for sublayer in table.sublayers if wanted[sublayer.name] for part in sublayer.projections]
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings)
    try:
        yield adapted
        adapted.merge_and_unload()
    except BaseException:
        adapted.unload()
        raise
    finally:
        model.requires_grad_(False).eval()


@contextmanager
def float32_weights(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """All weights trainable, and float32 meanwhile: steps of 1e-5 vanish when they are rounded to bfloat16."""
    precision = model.dtype
    _cast_parameters(model, torch.float32)
    model.requires_grad_(True)
    try:
        yield model
    finally:
        _cast_parameters(model, precision)
        model.requires_grad_(False).eval()


def _cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():  # not `model.to`: that would round the rotary table, a float32 buffer, as well
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _training_settings(model: torch.nn.Module) -> Iterator[None]:
    """No KV cache while training; afterwards what it was, and no gradient checkpointing, which the Trainer leaves on."""
    use_cache, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        if model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # the hook that checkpointing put on the embeddings


def _train(
    model: torch.nn.Module, config: FinetuneConfig, windows: torch.Tensor, precision: torch.dtype, seed: int
) -> tuple[int, list[float]]:
    """Optimizer steps taken and the losses logged on the way; the model keeps no trace of the Trainer."""
    progress = _Progress()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            model=model,
            args=_arguments(config, len(windows), folder, model.device, precision, seed),
            train_dataset=list(windows),
            data_collator=_collate,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if sys.stderr.isatty():
            trainer.add_callback(_Bar())
        trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast replaces `forward`
    return trainer.state.global_step, progress.losses


class _Trainer(Trainer):
    """Stops at the first loss that is not a number: going on would only ruin the weights for longer."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise RunError(f"the training loss became {loss.item()} in step {self.state.global_step + 1}: {ADVICE}")
        return result


class _Progress(TrainerCallback):
    """Plain log lines, the losses in the order they were logged, and no step with a broken gradient."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop before a gradient that is not finite gets into the weights (float16's loss scaling skips such a step)."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not args.fp16 and not torch.isfinite(norm):
            raise RunError(f"the gradient norm became {norm.item()} in step {state.global_step + 1}: {ADVICE}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is logged in any case."""
        control.should_log = control.should_log or state.global_step == state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line; the Trainer's closing summary, which has no loss of a step, is left out."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            rate = logs["learning_rate"]
            logger.info("step %d of %d  loss %.4f  lr %.2e", state.global_step, state.max_steps, self.losses[-1], rate)


class _Bar(ProgressCallback):
    """The bar alone: what it would print beside it is in the log lines already."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing."""


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)  # (batch, seq_len)
    return {"input_ids": ids, "labels": ids}


def _steps(config: FinetuneConfig, count: int) -> int:
    """Optimizer steps of a training on `count` windows."""
    return math.ceil(math.ceil(count / config.batch_size) / config.grad_accum) * config.epochs


def _arguments(
    config: FinetuneConfig, count: int, folder: str, device: torch.device, precision: torch.dtype, seed: int
) -> TrainingArguments:
    steps = _steps(config, count)
    on_gpu = device.type == "cuda"
    half = on_gpu and precision != torch.float32  # who asks for --dtype float32 gets no autocast
    bf16 = half and torch.cuda.is_bf16_supported(including_emulation=False)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup(steps),
        lr_scheduler_type="cosine",
        logging_steps=max(1, steps // 20),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        bf16=bf16,
        fp16=half and not bf16,
        gradient_checkpointing=on_gpu,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        disable_tqdm=not sys.stderr.isatty(),
    )
    _keep_on(arguments, device)
    return arguments


def _keep_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Train where the model is: by itself the Trainer takes cuda:0, and copies the model to all GPUs (DataParallel)."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)
        arguments.distributed_state.device = device  # of accelerate
        vars(arguments)["_setup_devices"] = device  # the cached value of `arguments.device`


def _save_adapter(model: torch.nn.Module, folder: Path, base: Path | None) -> None:
    """Write the adapter whole, in place of an older one."""
    if base is not None:  # peft would name the dense model that the weights came from once
        model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    # "auto" would ask the hub about the vocabulary
    write_folder_atomically(folder, lambda temporary: model.save_pretrained(temporary, save_embedding_layers=False))
