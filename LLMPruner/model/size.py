"""Bytes on disk before they are written, and parameters in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from LLMPruner.config import ExportConfig
from LLMPruner.model.device import DTYPES, resolve_device, resolve_dtype

if TYPE_CHECKING:
    import torch

    from LLMPruner.model.source import ModelSource


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared tensors counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def stored_dtype(source: ModelSource) -> str:
    """The precision that a model's weights are stored in; float32 for a quantized GGUF, which is dequantized."""
    name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"


def checkpoint_bytes(params: int, dtype: str, device: str) -> int:
    """An upper estimate of our `.bin`'s size: the weights, and 32 MB for tokenizer and headers.

    Raises UsageError for a device this machine lacks.
    """
    return params * resolve_dtype(dtype, resolve_device(device)).itemsize + (32 << 20)


def export_bytes(params: int, export: ExportConfig, dtype: str, device: str) -> int:
    """An upper estimate of the size of all exports of a model whose dense form has `params` parameters."""
    types = ["float32" if form == "gguf" and export.gguf_type == "f32" else dtype for form in export.formats]
    return sum(checkpoint_bytes(params, name, device) for name in types)
