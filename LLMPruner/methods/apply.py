"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner.forward import LayerRunner
from LLMPruner.methods.gqa_aware import query_columns, slice_attention
from LLMPruner.methods.mlp import slice_mlp
from LLMPruner.methods.repair import REPAIRS, Gram, Solver
from LLMPruner.plan import PruningPlan


@torch.no_grad()
def apply_plan(runner: LayerRunner, plan: PruningPlan, *, repair: str = "none", windows: torch.Tensor | None = None) -> None:
    """Slice the runner's model to `plan`, in place; with a repair, `windows` `(n, seq_len)` are the calibration tokens.

    Layers are walked in order on pruned activations: what a layer is healed on is what reaches it in the pruned model.
    """
    solver = REPAIRS[repair]
    hidden = None if solver is None else runner.embed(windows)
    pruned = [
        index
        for index, counts in enumerate(zip(plan.kv_counts, plan.channel_counts, strict=True))
        if counts != plan.dense_counts
    ]
    for index in tqdm(range(max(pruned, default=-1) + 1), desc="apply", disable=None, leave=False):
        hidden = _attention(runner, plan, index, solver, hidden)
        hidden = _mlp(runner, plan, index, solver, hidden)


def _attention(runner: LayerRunner, plan: PruningPlan, index: int, solver: Solver | None, hidden: torch.Tensor | None):
    """Slice and heal the attention of one layer; returns the hidden states after it (None without a repair)."""
    groups, attention = plan.layers[index].kv_groups, runner.decoder_layer(index).self_attn
    if len(groups) < plan.geometry.num_kv_heads:
        healed = None
        if solver is not None:
            gram = Gram()
            runner.attention(index, hidden, gram.add)
            healed = solver(attention.o_proj.weight, gram.matrix, query_columns(groups, plan.geometry))
        slice_attention(attention, groups, plan.geometry)
        _assign(attention.o_proj, healed)
    return None if hidden is None else runner.attention(index, hidden)


def _mlp(runner: LayerRunner, plan: PruningPlan, index: int, solver: Solver | None, hidden: torch.Tensor | None):
    """Slice and heal the MLP of one layer; returns the hidden states after it (None without a repair)."""
    channels, mlp = plan.layers[index].channels, runner.decoder_layer(index).mlp
    if len(channels) < plan.geometry.intermediate_size:
        healed = None
        if solver is not None:
            gram = Gram()
            runner.mlp(index, hidden, gram.add)
            healed = solver(mlp.down_proj.weight, gram.matrix, torch.tensor(channels))
        slice_mlp(mlp, channels)
        _assign(mlp.down_proj, healed)
    return None if hidden is None else runner.mlp(index, hidden)


def _assign(linear: nn.Linear, healed: torch.Tensor | None) -> None:
    if healed is not None:
        linear.weight.data = healed.contiguous()
