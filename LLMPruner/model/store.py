"""Where weights are: whoever touches those of a decoder layer asks `with store.layer(i) as layer`.

Embedding, final norm, head and rotary tables are asked for here too. The weights of a `ResidentStore` are all in memory, on
one device; a store that reads layers from disk as they are asked for is another class of the same methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from LLMPruner.plan import Geometry

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class ResidentStore:
    """A model whose weights are in memory. Attention is causal over whole, unpadded windows."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        if model.config._attn_implementation not in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation("sdpa")  # eager attention is causal only when it is given a mask
        self.model = model
        self.geometry = Geometry.from_config(model.config.to_dict())
        table = self.geometry.table
        self._layers, self._embedding, self.final_norm, self.head = (
            model.get_submodule(path) for path in (table.layers, table.embedding, table.norm, table.head)
        )
        self._rotary: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where layers compute."""
        return self._embedding.weight.device

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on `device`, as long as the context is open. Changes to it are kept."""
        yield self._layers[index]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `(n, seq_len)` to what enters layer 0, `(n, seq_len, hidden)`."""
        return self._embedding(ids.to(self.device))

    @torch.no_grad()
    def rotary(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions of hidden states `(n, seq_len, hidden)`, in their dtype."""
        key = (hidden.shape[1], hidden.dtype)
        if key not in self._rotary:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            self._rotary[key] = self.model.model.rotary_emb(hidden, position_ids=positions)
        return self._rotary[key]

    def requires_grad_(self, requires: bool) -> None:
        """Whether autograd is to follow the weights."""
        self.model.requires_grad_(requires)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all weights, one at a time; a head that is the embedding again is left out."""
        for name, tensor in self.model.state_dict().items():
            if not (self.geometry.tied_embeddings and name == f"{self.geometry.table.head}.weight"):
                yield name, tensor.detach()
