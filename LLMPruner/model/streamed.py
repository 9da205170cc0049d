"""Weights that stay on disk: one decoder layer at a time is on the device, and the next one is read meanwhile.

Peak memory of the device: a layer, and embedding or head while they are used, however many layers the model has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from LLMPruner.errors import RunError
from LLMPruner.memory import free_large_blocks_at_once, return_freed_memory
from LLMPruner.model.finished import UNCHANGED, FinishedLayers
from LLMPruner.model.hidden import Home
from LLMPruner.model.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from LLMPruner.model.tensors import StoredTensors


class StreamedStore(Store):
    """A model whose weights are read layer by layer, from `tensors` (by name) or, once they were changed, from `finished`.

    `model` is the model on the meta device, but for its rotary table, in the precision to compute in. Hidden states lie in host
    memory, and beyond `limit` bytes in files.
    """

    resident = False

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: StoredTensors,
        device: torch.device,
        finished: FinishedLayers,
        *,
        limit: int,
    ) -> None:
        free_large_blocks_at_once()
        self._device, self._tensors, self._dtype = device, tensors, model.dtype
        folder: Path = finished.folder
        folder.mkdir(parents=True, exist_ok=True)
        home = Home(torch.device("cpu"), pinned=device.type == "cuda", limit=limit, folder=folder)
        super().__init__(model.requires_grad_(False), home, finished)
        model.model.rotary_emb.to(device)
        self.final_norm = model.get_submodule(self.table.norm)
        self.final_norm.load_state_dict({"weight": self._read(f"{self.table.norm}.weight").to(device)}, assign=True)
        self._head: nn.Linear | None = None
        self._embedding: torch.Tensor | None = None
        self._open = [0] * self.num_layers  # how many contexts of each layer are open
        self._here: set[int] = set()  # layers on the device
        self._dense = set(range(self.num_layers))  # layers that nobody changed
        self._last = -1
        self._ahead: tuple[int, Future] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layers")

    @property
    def device(self) -> torch.device:
        """Where layers compute."""
        return self._device

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on `device`, while the context is open. It is changed in `edited` only."""
        if index not in self._here:
            self._bring(index)
        self._open[index] += 1
        try:
            yield self._layers[index]
        finally:
            self._open[index] -= 1

    @contextmanager
    def edited(self, indices: Sequence[int], state: str) -> Iterator[None]:
        """As of any store; what was changed is read from `finished` from then on."""
        with super().edited(indices, state):
            yield
        self._dense -= set(indices)

    def _adopt(self, index: int) -> None:
        self._drop(index)
        self._dense.discard(index)
        if self._ahead is not None and self._ahead[0] == index:
            self._ahead = None

    def _bring(self, index: int) -> None:
        """Put a layer on the device in the place of those that nobody uses, and read the next one meanwhile."""
        if not any(self._open):
            self._head = None
        for other in [other for other in self._here if not self._open[other]]:
            self._drop(other)
        return_freed_memory()
        following = index + (1 if index >= self._last else -1)
        weights = self._awaited(index)
        self._last, self._ahead = index, None
        self._layers[index].load_state_dict({name: self._moved(value) for name, value in weights.items()}, assign=True)
        self._here.add(index)
        if 0 <= following < self.num_layers and following not in self._here:
            self._ahead = following, self._reader.submit(self._read_layer, following)

    def _awaited(self, index: int) -> dict[str, torch.Tensor]:
        if self._ahead is not None:
            wanted, future = self._ahead
            if wanted == index:
                return future.result()
            future.cancel()
        return self._read_layer(index)

    def _drop(self, index: int) -> None:
        self._layers[index].to("meta")
        self._here.discard(index)

    def _read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's weights in host memory, by their names within it. No module is touched: the reader's thread runs this."""
        return {name: self._owned(value) for name, value in self._mapped_layer(index).items()}

    def _mapped_layer(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's weights as they lie on disk, by their names within it."""
        if index not in self._dense:
            return self.finished.read(index)
        prefix = f"{self.table.layers}.{index}."
        return {name.removeprefix(prefix): self._tensors[name] for name in self._tensors if name.startswith(prefix)}

    def _read(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name].to(self._dtype)
        except (OSError, KeyError) as error:
            raise RunError(f"{name} cannot be read any more: {error}") from error

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory, in the precision to compute in: what is mapped is read from the disk while the device waits."""
        copy = tensor.to(self._dtype, copy=True)
        return copy.pin_memory() if self.home.pinned else copy

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=self._device.type == "cuda")

    @property
    def head(self) -> nn.Linear:
        """The language-model head, on the device until the next layer takes its place."""
        if self._head is None:
            name = self.table.embedding if self.geometry.tied_embeddings else self.table.head
            weight = self._read(f"{name}.weight").to(self._device)
            self._head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self._head.weight = nn.Parameter(weight, requires_grad=False)
        return self._head

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `(n, seq_len)` to what enters layer 0, `(n, seq_len, hidden)`: only their rows are read."""
        weight = self._embedding if self._embedding is not None else self._tensors[f"{self.table.embedding}.weight"]
        if not self._tensors.mapped:  # dequantized once, not for every batch
            self._embedding = weight
        return functional.embedding(ids.cpu(), weight).to(self._dtype).to(self._device)

    def settle(self) -> None:
        """Put the layers that nobody changed on disk as they are to be written, one at a time, where the model's own files have
        them otherwise: else all would be cast in memory together when `tensors` are written."""
        for index in sorted(self._dense):
            weights = self._mapped_layer(index).values()
            if not self._tensors.mapped or any(value.dtype != self._dtype for value in weights):
                with self.edited((index,), UNCHANGED):
                    pass

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all weights, mapped into memory; a head that is the embedding again is left out."""
        yield f"{self.table.embedding}.weight", self._read(f"{self.table.embedding}.weight")
        for index in range(self.num_layers):
            weights = self._mapped_layer(index)
            for name in self._layers[index].state_dict():  # in the order of a model in memory
                yield f"{self.table.layers}.{index}.{name}", weights[name].to(self._dtype)
        yield f"{self.table.norm}.weight", self._read(f"{self.table.norm}.weight")
        if not self.geometry.tied_embeddings:
            yield f"{self.table.head}.weight", self._read(f"{self.table.head}.weight")
