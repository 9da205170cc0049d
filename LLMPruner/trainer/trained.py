"""What of a model is trained: LoRA adapters beside its weights, or all weights. Both leave a plain model behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from LLMPruner.families.family import Family
from LLMPruner.files import write_folder_atomically
from LLMPruner.training_config import LoraConfig


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
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
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
def training_settings(model: torch.nn.Module, *, recompute: bool) -> Iterator[None]:
    """Without a KV cache, and with activations computed anew on the way back where asked for; afterwards as before."""
    use_cache, model.config.use_cache = model.config.use_cache, False
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        if recompute:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # a hook that it put on the embeddings


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: torch.nn.Module, folder: Path, base: Path | None) -> None:
    """Write the adapter whole, in place of an older one; it names `base` as its model."""
    if base is not None:  # peft would name the dense model that the weights came from once
        model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    # "auto" would ask the hub about the vocabulary
    write_folder_atomically(folder, lambda temporary: model.save_pretrained(temporary, save_embedding_layers=False))
