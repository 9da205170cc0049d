"""KV groups: score, select, slice. A group is one KV head with its query heads, so the Q:KV ratio holds by construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from LLMPruner.plan import Geometry

if TYPE_CHECKING:  # importance.criteria, whose registry the command line reads, must not wait for torch
    import torch
    from torch import nn


def group_scores(columns: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum a score per row or column `(groups * n,)`, of o_proj's inputs for example, into one per group `(groups,)`.

    Query heads of one KV head are adjacent in q_proj and o_proj, so a reshape is the grouping.
    """
    return columns.view(groups, -1).sum(dim=1)  # (groups,)


def select_units(scores: Sequence[float], keep: int) -> tuple[int, ...]:
    """The indices of the `keep` highest scores, ascending; of equal scores the earlier unit is kept."""
    ranked = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    return tuple(sorted(ranked[:keep]))


def slice_attention(layer: nn.Module, groups: Sequence[int], geometry: Geometry) -> None:
    """Keep only the KV groups `groups` of a decoder layer's attention, in place: rows of q, k, v and columns of o."""
    from LLMPruner.families.slicing import slice_sublayer

    slice_sublayer(layer, geometry.table.attention, groups, geometry)
