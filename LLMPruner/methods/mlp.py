"""MLP channels: slice. A channel is a row of gate and up and a column of down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from LLMPruner.methods.gqa_aware import slice_linear

if TYPE_CHECKING:  # as gqa_aware: the command line reads registries that lead here
    from torch import nn


def slice_mlp(mlp: nn.Module, channels: Sequence[int]) -> None:
    """Keep only `channels` of one MLP: rows of gate and up, columns of down. In place."""
    import torch

    kept = torch.tensor(channels)
    mlp.gate_proj = slice_linear(mlp.gate_proj, rows=kept)
    mlp.up_proj = slice_linear(mlp.up_proj, rows=kept)
    mlp.down_proj = slice_linear(mlp.down_proj, columns=kept)
    mlp.intermediate_size = len(channels)
