"""What is unimportant: a score per KV group and per MLP channel of every layer, float32, the larger the more needed.

A criterion is one function from a layer and its statistics to the two score vectors, and one entry in CRITERIA. Which
statistics it reads (gate gradients so far) says its `needs`; they are gathered once, in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from LLMPruner.methods.gqa_aware import group_scores
from LLMPruner.plan import Geometry

if TYPE_CHECKING:  # the command line reads CRITERIA and must not wait for torch
    import torch
    from torch import nn

    from LLMPruner.forward import LayerRunner


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer: `kv_groups` `(kv_heads,)` and `channels` `(intermediate,)`, float32 on the CPU."""

    kv_groups: torch.Tensor
    channels: torch.Tensor


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer: squared gate gradients per KV group and per channel."""

    group_gates: torch.Tensor
    channel_gates: torch.Tensor
    tokens: int = 0


Score = Callable[["nn.Module", LayerStatistics | None, Geometry, int], UnitScores]


@dataclass(frozen=True)
class Criterion:
    """A scoring function `(layer, statistics, geometry, seed)` and whether it needs gate gradients."""

    score: Score
    needs_gates: bool = False


def taylor(layer: nn.Module, statistics: LayerStatistics | None, geometry: Geometry, seed: int) -> UnitScores:
    """Fisher-Taylor: the mean squared gradient of the unit's gate, taken per token.

    Second-order effect on the loss of removing the unit, up to a constant (Molchanov et al. 2019; Kwon et al. 2022).
    """
    return UnitScores(statistics.group_gates / statistics.tokens, statistics.channel_gates / statistics.tokens)


def magnitude(layer: nn.Module, statistics: LayerStatistics | None, geometry: Geometry, seed: int) -> UnitScores:
    """Squared L2 norm of all weights of the unit (Li et al. 2017)."""
    attention, mlp = layer.self_attn, layer.mlp
    rows = {name: getattr(attention, name).weight.float().square().sum(1) for name in ("q_proj", "k_proj", "v_proj")}
    groups = sum(group_scores(row, geometry.num_kv_heads) for row in rows.values())
    groups = groups + group_scores(attention.o_proj.weight.float().square().sum(0), geometry.num_kv_heads)
    channels = sum(getattr(mlp, name).weight.float().square().sum(1) for name in ("gate_proj", "up_proj"))
    channels = channels + mlp.down_proj.weight.float().square().sum(0)
    return UnitScores(groups.detach().cpu(), channels.detach().cpu())


def random(layer: nn.Module, statistics: LayerStatistics | None, geometry: Geometry, seed: int) -> UnitScores:
    """Uniform noise, the control: anything worth using must beat it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return UnitScores(
        torch.rand(geometry.num_kv_heads, generator=generator), torch.rand(geometry.intermediate_size, generator=generator)
    )


CRITERIA: dict[str, Criterion] = {
    "taylor": Criterion(taylor, needs_gates=True),
    "magnitude": Criterion(magnitude),
    "random": Criterion(random),
}


def score_units(
    runner: LayerRunner, geometry: Geometry, importance: str, *, windows: torch.Tensor | None, seed: int
) -> list[UnitScores]:
    """Score every layer's units by the named criterion; `windows` `(n, seq_len)` feed those that need gates."""
    criterion = CRITERIA[importance]
    statistics = gate_statistics(runner, geometry, windows) if criterion.needs_gates else [None] * runner.num_layers
    return [
        criterion.score(runner.decoder_layer(index), gathered, geometry, seed + index)
        for index, gathered in enumerate(statistics)
    ]


def gate_statistics(runner: LayerRunner, geometry: Geometry, windows: torch.Tensor) -> list[LayerStatistics]:
    """Gather every layer's squared gate gradients in one streamed pass over `windows`."""
    import torch

    sums = [
        LayerStatistics(torch.zeros(geometry.num_kv_heads), torch.zeros(geometry.intermediate_size))
        for _ in range(runner.num_layers)
    ]

    def visit(index: int, attention: torch.Tensor, mlp: torch.Tensor) -> None:
        groups = attention.unflatten(-1, (geometry.num_kv_heads, -1)).sum(-1)  # (batch, seq_len, kv_heads)
        sums[index].group_gates += groups.square().sum((0, 1)).cpu()
        sums[index].channel_gates += mlp.square().sum((0, 1)).cpu()
        sums[index].tokens += attention.shape[0] * attention.shape[1]

    runner.gate_gradients(windows, visit)
    return sums
