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


def group_columns(groups: Sequence[int], width: int) -> torch.Tensor:
    """The indices of `groups`' rows or columns, each group being `width` adjacent ones. int64 `(len(groups) * width,)`."""
    import torch

    return (torch.tensor(groups).unsqueeze(1) * width + torch.arange(width)).flatten()


def query_columns(groups: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """o_proj's input columns (q_proj's rows) of the given KV groups."""
    return group_columns(groups, geometry.group_width)


def slice_attention(attention: nn.Module, groups: Sequence[int], geometry: Geometry) -> None:
    """Keep only `groups` of one attention sublayer: rows of q, k, v and columns of o. In place."""
    queries = query_columns(groups, geometry)
    keys = group_columns(groups, geometry.head_dim)
    attention.q_proj = slice_linear(attention.q_proj, rows=queries)
    attention.k_proj = slice_linear(attention.k_proj, rows=keys)
    attention.v_proj = slice_linear(attention.v_proj, rows=keys)
    attention.o_proj = slice_linear(attention.o_proj, columns=queries)


def slice_linear(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    """A new Linear of the given output rows and input columns, with storage of its own."""
    from torch import nn

    weight = linear.weight.detach()
    if rows is not None:
        weight = weight[rows.to(weight.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    bias = None
    if linear.bias is not None:
        bias = linear.bias.detach() if rows is None else linear.bias.detach()[rows.to(linear.bias.device)]
    sliced = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    sliced.weight = nn.Parameter(weight.clone().contiguous(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        sliced.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
    return sliced
