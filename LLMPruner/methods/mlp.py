"""MLP channels: slice. A channel is a row of gate and up and a column of down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from LLMPruner.families.slicing import slice_sublayer
from LLMPruner.plan import Geometry

if TYPE_CHECKING:
    from torch import nn


def slice_mlp(layer: nn.Module, channels: Sequence[int], geometry: Geometry) -> None:
    """Keep only `channels` of a decoder layer's MLP, in place: rows of gate and up, columns of down."""
    slice_sublayer(layer, geometry.table.mlp, channels, geometry)
