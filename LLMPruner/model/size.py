"""Bytes on disk before they are written, and parameters in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from LLMPruner.config import ExportConfig
from LLMPruner.cost import Cost, Setup, Work
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
    return name if name in DTYPES and name != "auto" else "float32"


def checkpoint_bytes(params: int, dtype: str, device: str) -> int:
    """An upper estimate of our `.bin`'s size: the weights, and 32 MB for tokenizer and headers.

    Raises UsageError for a device this machine lacks.
    """
    return params * resolve_dtype(dtype, resolve_device(device)).itemsize + (32 << 20)


def export_bytes(params: int, export: ExportConfig, dtype: str, device: str) -> int:
    """An upper estimate of the size of all exports of a model whose dense form has `params` parameters."""
    types = ["float32" if form == "gguf" and export.gguf_type == "f32" else dtype for form in export.formats]
    return sum(checkpoint_bytes(params, name, device) for name in types)


LIBRARIES = 520_000_000  # bytes of main memory that Python, torch and transformers take themselves
LOADING = 8.0  # seconds of imports, of the tokenizer and of cutting windows, whatever the model


def load_cost(setup: Setup) -> Cost:
    """What loading costs; of a streamed model nothing but headers is read. Rough: text is taken to be of a common size."""
    size = setup.geometry.dense_params
    if not setup.resident:
        return Cost("load", waits=LOADING)
    host = 0 if setup.cpu or setup.itemsize == setup.stored else size * setup.itemsize  # as it is, a file is mapped
    return Cost(
        "load", Work(traffic=size * (setup.stored + setup.itemsize)), host=host, read=size * setup.stored, waits=LOADING
    )


def save_cost(setup: Setup) -> Cost:
    """What writing our `.bin` costs: from a GPU, all weights are in main memory first."""
    size = setup.weights(pruned=True)
    host = 0 if setup.cpu or not setup.resident else size
    return Cost("save", host=host, read=0 if setup.resident else size, written=size, left=size, pruned=True)


def export_cost(setup: Setup, export: ExportConfig) -> Cost:
    """What the exports cost: rough, for a padded one may be as large as the dense model, which is taken here."""
    size = 0
    for form in export.formats:
        width = 4 if form == "gguf" and export.gguf_type == "f32" else setup.itemsize
        size += setup.weights(pruned=form != "padded") // setup.itemsize * width
    return Cost("export", host=min(size, 5 << 30), written=size, left=size, pruned=True)
