"""Units to modules: new Linears of the kept units, and what stands where a whole sublayer was removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from LLMPruner.families.family import Sublayer

if TYPE_CHECKING:
    from LLMPruner.plan import Geometry, PruningPlan


class RemovedAttention(nn.Module):
    """No attention: no weights, and no entry in the KV cache. It adds nothing to the residual stream, and costs nothing."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Zeros `(batch, seq_len, hidden)` and no attention weights."""
        return torch.zeros_like(hidden_states), None


class RemovedMLP(nn.Module):
    """No MLP: no weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros `(batch, seq_len, hidden)`."""
        return torch.zeros_like(hidden_states)


REMOVED: dict[str, type[nn.Module]] = {"attention": RemovedAttention, "mlp": RemovedMLP}


def is_removed(module: nn.Module) -> bool:
    """Whether `module` stands for a sublayer that was removed."""
    return isinstance(module, tuple(REMOVED.values()))


def output_projection(layer: nn.Module, sublayer: Sublayer) -> nn.Linear:
    """o_proj or down_proj of a decoder layer."""
    return getattr(getattr(layer, sublayer.attribute), sublayer.output.name)


def unit_indices(units: Sequence[int], width: int) -> torch.Tensor:
    """The rows or columns of `units`, each owning `width` adjacent ones. int64 `(len(units) * width,)`."""
    return (torch.tensor(units).unsqueeze(1) * width + torch.arange(width)).flatten()


def output_columns(sublayer: Sublayer, kept: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """Columns of the output projection that belong to the units `kept`, int64."""
    return unit_indices(kept, geometry.segment(sublayer.output))


def slice_sublayer(layer: nn.Module, sublayer: Sublayer, kept: Sequence[int], geometry: Geometry) -> None:
    """Keep only the units `kept` of a decoder layer's sublayer, in place; with none kept it is removed whole."""
    if not kept:
        setattr(layer, sublayer.attribute, REMOVED[sublayer.name]())
        return
    module = getattr(layer, sublayer.attribute)
    for projection in sublayer.inputs:
        rows = unit_indices(kept, geometry.segment(projection))
        setattr(module, projection.name, slice_linear(getattr(module, projection.name), rows=rows))
    output = slice_linear(getattr(module, sublayer.output.name), columns=output_columns(sublayer, kept, geometry))
    setattr(module, sublayer.output.name, output)
    _state_units(module, sublayer, len(kept))


def shape_layer(layer: nn.Module, plan: PruningPlan, index: int) -> None:
    """Give a dense decoder layer new Linears of the shapes that layer `index` has in `plan`, in place."""
    geometry = plan.geometry
    for sublayer in geometry.table.sublayers:
        units = plan.counts(sublayer.name)[index]
        if not units:
            setattr(layer, sublayer.attribute, REMOVED[sublayer.name]())
            continue
        module, hidden = getattr(layer, sublayer.attribute), geometry.hidden_size
        for projection in sublayer.inputs:
            rows = units * geometry.segment(projection)
            setattr(module, projection.name, nn.Linear(hidden, rows, bias=geometry.has_bias(projection)))
        columns, bias = units * geometry.segment(sublayer.output), plan.has_output_bias(sublayer.name, index)
        setattr(module, sublayer.output.name, nn.Linear(columns, hidden, bias=bias))
        _state_units(module, sublayer, units)


def _state_units(module: nn.Module, sublayer: Sublayer, units: int) -> None:
    if sublayer.states_units is not None:
        setattr(module, sublayer.states_units, units)


def slice_linear(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> nn.Linear:
    """A new Linear of the given output rows and input columns, with storage of its own."""
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
