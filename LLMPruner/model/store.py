"""Where weights are: whoever touches those of a decoder layer asks `with store.layer(i) as layer`.

Embedding, final norm, head and rotary tables are asked for here too. The weights of a `ResidentStore` are all in memory, on
one device; those of a `StreamedStore` (streamed.py) are read from disk as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from LLMPruner.families.slicing import shape_layer
from LLMPruner.model.hidden import Home
from LLMPruner.plan import Geometry, PruningPlan

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from LLMPruner.model.finished import FinishedLayers


class Store:
    """What both kinds have in common: the modules of `model`. Attention is causal over whole, unpadded windows.

    Layers whose changes are to outlive the process are kept in `finished`, where there is such a place.
    """

    resident: bool  # whether all layers are at hand, so that the order in which they are asked for costs nothing
    final_norm: nn.Module
    head: nn.Module

    def __init__(self, model: LlamaForCausalLM, home: Home, finished: FinishedLayers | None = None) -> None:
        if model.config._attn_implementation not in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation("sdpa")  # eager attention is causal only when it is given a mask
        self.model, self.home, self.finished = model, home, finished
        self.geometry = Geometry.from_config(model.config.to_dict())
        self.table = self.geometry.table
        self._layers = model.get_submodule(self.table.layers)
        self._rotary: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where layers compute."""
        raise NotImplementedError

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on `device`, as long as the context is open."""
        raise NotImplementedError
        yield

    @contextmanager
    def edited(self, indices: Sequence[int], state: str) -> Iterator[None]:
        """Layers `indices` are being changed: what they are when the context closes is kept, all of it or nothing.

        `state` says what was done to them, for `finished`.
        """
        with ExitStack() as stack:
            layers = {index: stack.enter_context(self.layer(index)) for index in indices}
            yield
            if self.finished is not None:
                self.finished.write(layers, state)

    def restore(self, index: int, plan: PruningPlan) -> None:
        """Put the finished layer `index`, pruned to `plan`, in the place of the dense one."""
        with torch.device("meta"):
            shape_layer(self._layers[index], plan, index)
        self._layers[index].requires_grad_(False)
        self._adopt(index)

    def _adopt(self, index: int) -> None:
        """Take the weights of `finished` for layer `index`."""
        raise NotImplementedError

    @torch.no_grad()
    def rotary(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions of hidden states `(n, seq_len, hidden)`, in their dtype."""
        key = (hidden.shape[1], hidden.dtype)
        if key not in self._rotary:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            self._rotary[key] = self.model.model.rotary_emb(hidden, position_ids=positions)
        return self._rotary[key]

    def settle(self) -> None:
        """Make ready for all weights to be written."""

    def requires_grad_(self, requires: bool) -> None:
        """Whether autograd is to follow the weights."""
        self.model.requires_grad_(requires)


class ResidentStore(Store):
    """A model whose weights are in memory."""

    resident = True

    def __init__(self, model: LlamaForCausalLM, finished: FinishedLayers | None = None) -> None:
        self._embedding = model.get_input_embeddings()
        super().__init__(model, Home(self.device), finished)
        self.final_norm, self.head = (model.get_submodule(path) for path in (self.table.norm, self.table.head))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.weight.device

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index`. Changes to it stay."""
        yield self._layers[index]

    def _adopt(self, index: int) -> None:
        weights = {name: value.to(self.device) for name, value in self.finished.read(index).items()}
        self._layers[index].load_state_dict(weights, assign=True)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `(n, seq_len)` to what enters layer 0, `(n, seq_len, hidden)`."""
        return self._embedding(ids.to(self.device))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all weights, one at a time; a head that is the embedding again is left out."""
        for name, tensor in self.model.state_dict().items():
            if not (self.geometry.tied_embeddings and name == f"{self.table.head}.weight"):
                yield name, tensor.detach()
