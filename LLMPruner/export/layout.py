"""How a pruned model is laid out for foreign loaders: the plan as written, and every tensor in that plan's shape.

A layout is itself a PruningPlan, one without removed sublayers: loaders know no layer without attention or MLP. What the
layout has beyond the model is zeros, and zeros change nothing: a zeroed KV group attends and answers zero, a zeroed channel
adds zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from LLMPruner.errors import UsageError
from LLMPruner.families.family import Family
from LLMPruner.families.llama import LLAMA, MISTRAL
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan, expected_shapes

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

ZERO_CHANNELS = 32  # of the MLP that stands for a removed one: a block of Q8_0; llama.cpp misreads a width of 0


def filled(plan: PruningPlan) -> PruningPlan:
    """The plan with a zeroed KV group, or a few zeroed channels, where a sublayer was removed."""
    channels = tuple(range(min(ZERO_CHANNELS, plan.geometry.intermediate_size)))
    layers = tuple(LayerPlan(layer.kv_groups or (0,), layer.channels or channels) for layer in plan.layers)
    return replace(plan, layers=layers)


def stock(plan: PruningPlan) -> PruningPlan:
    """A dense plan wide enough for every layer of `plan`: the stock model of its family that any loader takes.

    A Mistral is written as a Llama where a Llama can be: without a sliding window they are one function. Llama's heads must
    divide its width (transformers 5), Mistral knows no biases; where they are needed KV groups are added until both hold.
    Raises UsageError where the family has no place for the biases that a repair added.
    """
    geometry, wide = plan.geometry, filled(plan)
    table = LLAMA if geometry.family == MISTRAL.model_type else geometry.table
    biases = {}
    for sublayer in table.sublayers:
        needed = any(plan.has_output_bias(sublayer.name, index) for index in range(geometry.num_layers))
        if isinstance(sublayer.output.bias, str):
            biases[sublayer.output.bias] = getattr(geometry, sublayer.output.bias) or needed
        elif needed:
            raise UsageError(f"no stock {table.name} has a place for the biases of --repair bias: choose the hf export alone")
    size = replace(
        geometry, family=table.model_type, intermediate_size=max(wide.channel_counts), **biases, **_heads(wide, table, biases)
    )
    return PruningPlan.dense(size if _takes(size) else replace(size, family=MISTRAL.model_type))


def _heads(wide: PruningPlan, table: Family, biases: Mapping[str, bool]) -> dict[str, int]:
    """Heads of the stock model: those of the widest layer, or as many more as the family's loaders need."""
    geometry = wide.geometry
    groups = max(wide.kv_counts) if table.states_head_dim else geometry.num_kv_heads
    while table is LLAMA and any(biases.values()) and geometry.hidden_size % (groups * geometry.q_per_kv):
        groups += 1
        if groups > geometry.hidden_size:
            raise UsageError("with these biases and head counts no stock Llama can be written: choose the hf export alone")
    return {"num_heads": groups * geometry.q_per_kv, "num_kv_heads": groups}


def _takes(size: Geometry) -> bool:
    """Whether transformers takes a stock config of these sizes: it refuses a Llama whose heads do not divide its width."""
    return size.family != LLAMA.model_type or size.hidden_size % size.num_heads == 0


def is_uniform(plan: PruningPlan) -> bool:
    """Whether all layers have the same shape, so that the stock layout costs nothing."""
    shapes = set(zip(plan.kv_counts, plan.channel_counts, strict=True))
    return len(shapes) == 1 and 0 not in shapes.pop() and not plan.adds_bias


def is_stock(plan: PruningPlan) -> bool:
    """Whether the stock layout is the plan itself: no layer padded, no head added for a loader."""
    if not is_uniform(plan):
        return False
    try:
        return stock(plan).total_params == plan.total_params
    except UsageError:
        return False


def counted(plan: PruningPlan, layout: PruningPlan) -> int:
    """Parameters of `layout` as our own loader counts them: without what stands for removed sublayers."""
    layers = tuple(
        LayerPlan(wide.kv_groups if own.kv_groups else (), wide.channels if own.channels else ())
        for own, wide in zip(plan.layers, layout.layers, strict=True)
    )
    return replace(layout, layers=layers).total_params


def laid_out(
    loaded: LoadedModel, layout: PruningPlan, names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors (None: all) in the shape of `layout`, padded with zeros, one at a time; a tied head is left out."""
    state, shapes = dict(loaded.store.tensors()), expected_shapes(layout)
    for name in shapes if names is None else names:
        yield name, _padded(state.get(name), shapes[name], loaded.model.dtype)


def _padded(tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if tensor is not None and tuple(tensor.shape) == shape:
        return tensor.detach()
    result = torch.zeros(shape, dtype=dtype)
    if tensor is not None:
        result[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
    return result
