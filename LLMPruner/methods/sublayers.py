"""The two kinds of sublayer, attention and MLP, behind one interface: units that own columns of an output projection.

What prunes, heals or measures a sublayer is written once and asks its kind for what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from LLMPruner.methods.gqa_aware import query_columns, slice_attention
from LLMPruner.methods.mlp import slice_mlp
from LLMPruner.plan import Geometry, PruningPlan

if TYPE_CHECKING:  # importance.criteria reads this module and must not wait for torch
    import torch
    from torch import nn

    from LLMPruner.forward import LayerRunner


@dataclass(frozen=True)
class Kind:
    """One kind of sublayer: where it sits in a decoder layer, what its units are, and how it is sliced."""

    name: str
    attribute: str  # of the decoder layer
    inputs: tuple[str, ...]  # projections that units own rows of
    output: str  # the projection that units own columns of
    units: Callable[[Geometry], int]  # in the dense sublayer
    slice: Callable[[nn.Module, Sequence[int], Geometry], None]

    def module(self, layer: nn.Module) -> nn.Module:
        """The sublayer of a decoder layer."""
        return getattr(layer, self.attribute)

    def projection(self, layer: nn.Module) -> nn.Linear:
        """Its output projection, o_proj or down_proj."""
        return getattr(self.module(layer), self.output)

    def kept(self, plan: PruningPlan, index: int) -> tuple[int, ...]:
        """The units that layer `index` keeps."""
        layer = plan.layers[index]
        return layer.kv_groups if self.name == "attention" else layer.channels

    def columns(self, kept: Sequence[int], geometry: Geometry) -> torch.Tensor:
        """Columns of the output projection that belong to the units `kept`, int64."""
        import torch

        return query_columns(kept, geometry) if self.name == "attention" else torch.tensor(kept)

    def step(self, runner: LayerRunner) -> Callable[..., torch.Tensor]:
        """The runner's method that moves hidden states past the sublayer of a layer."""
        return runner.attention if self.name == "attention" else runner.mlp

    def prune(self, layer: nn.Module, kept: Sequence[int], geometry: Geometry) -> None:
        """Slice the sublayer of a decoder layer to `kept` in place; with none kept it is removed whole."""
        if kept:
            self.slice(self.module(layer), kept, geometry)
            return
        from LLMPruner.removed import RemovedAttention, RemovedMLP

        setattr(layer, self.attribute, RemovedAttention() if self.name == "attention" else RemovedMLP())


ATTENTION = Kind(
    name="attention",
    attribute="self_attn",
    inputs=("q_proj", "k_proj", "v_proj"),
    output="o_proj",
    units=lambda geometry: geometry.num_kv_heads,
    slice=slice_attention,
)
MLP = Kind(
    name="mlp",
    attribute="mlp",
    inputs=("gate_proj", "up_proj"),
    output="down_proj",
    units=lambda geometry: geometry.intermediate_size,
    slice=lambda module, kept, geometry: slice_mlp(module, kept),
)
KINDS = {kind.name: kind for kind in (ATTENTION, MLP)}
