"""The weights of a model on disk, each read when it is asked for by its name: safetensors files, our `.bin`, or a GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from LLMPruner.errors import RunError
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.source import ModelSource, weight_files
from LLMPruner.model.weights import passed_over

if TYPE_CHECKING:
    import torch


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Tensors by name, on the CPU and mapped into memory where the file has them as they are, not read.

    Without a tied head, the zeros that stand for removed sublayers, and old rotary tables. Raises RunError when a file is
    unreadable.
    """

    def __init__(self, source: ModelSource) -> None:
        needless, self._path = passed_over(source.plan), source.path
        self.mapped = source.kind != "gguf"  # else every tensor is dequantized whenever it is asked for
        self._readers = {"bin": _of_bin, "gguf": _of_gguf, "hf": _of_directory}[source.kind](source)
        self._names = [name for name in self._readers if not needless(name)]

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError

        try:
            return self._readers[name](name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{name} of {self._path} is damaged and cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of_bin(source: ModelSource) -> dict:
    tensors = load_checkpoint(source.path)[0]
    return dict.fromkeys(tensors, tensors.__getitem__)


def _of_gguf(source: ModelSource) -> dict:
    import torch

    return dict.fromkeys(
        source.gguf.names(source.plan), lambda name: torch.from_numpy(source.gguf.value(name, source.plan.geometry))
    )


def _of_directory(source: ModelSource) -> dict:
    from safetensors import SafetensorError, safe_open

    readers = {}
    for path in weight_files(source):
        try:
            handle = safe_open(path, framework="pt")
            readers |= dict.fromkeys(handle.keys(), handle.get_tensor)
        except SafetensorError as error:
            raise RunError(f"{path} is damaged and cannot be read: {error}") from error
    return readers
