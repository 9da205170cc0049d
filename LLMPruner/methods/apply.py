"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner.forward import LayerRunner
from LLMPruner.methods.moments import Moments
from LLMPruner.methods.repair import REPAIRS, Evidence, Healed, Repair
from LLMPruner.methods.sublayers import KINDS, Kind
from LLMPruner.plan import PruningPlan

logger = logging.getLogger("LLMPruner")

HELD_OUT = 4  # every fourth calibration window is held out for the choices a repair makes


@dataclass
class Streams:
    """Hidden states `(n, seq_len, hidden)` of the calibration windows in the dense and in the pruned model."""

    dense: torch.Tensor
    pruned: torch.Tensor


@torch.no_grad()
def apply_plan(runner: LayerRunner, plan: PruningPlan, *, repair: str = "none", windows: torch.Tensor | None = None) -> None:
    """Slice the runner's model to `plan`, in place; with a repair, `windows` `(n, seq_len)` are the calibration tokens.

    Layers are walked in order on pruned activations: what a layer is healed on is what reaches it in the pruned model. The
    dense stream runs beside it, through each layer before that is sliced, and says what the layer should have answered.
    """
    method = REPAIRS[repair]
    streams = None
    if method is not None:
        hidden = runner.embed(windows)
        streams = Streams(hidden, hidden)
    for index in tqdm(range(runner.num_layers), desc="apply", disable=None, leave=False):
        for kind in KINDS.values():
            kept = kind.kept(plan, index)
            whole = len(kept) == kind.units(plan.geometry)
            healed = None
            if streams is not None:
                heals = kept and not (whole and (streams.dense is streams.pruned or not method.refits_whole))
                healed = _pass(runner, kind, index, plan, method if heals else None, streams)
            if not whole:
                kind.prune(runner.decoder_layer(index), kept, plan.geometry)
            if healed is not None:
                _assign(kind.projection(runner.decoder_layer(index)), healed)
                logger.info("layer %2d %s healed: %s", index, kind.name, healed.choice)


def _pass(
    runner: LayerRunner, kind: Kind, index: int, plan: PruningPlan, method: Repair | None, streams: Streams
) -> Healed | None:
    """Move both streams past one dense sublayer; with a `method`, gather the evidence and heal it."""
    step, before, dense_before = kind.step(runner), streams.pruned, streams.dense
    streams.dense = step(index, dense_before)
    kept = kind.kept(plan, index)
    if method is None:  # whole, or removed whole
        if kept:
            streams.pruned = streams.dense if before is dense_before else step(index, before)
        return None
    inputs: list[torch.Tensor] = []
    step(index, before, inputs.append)
    rows = torch.cat(inputs)  # (tokens, columns)
    projection = kind.projection(runner.decoder_layer(index))
    columns = kind.columns(kept, plan.geometry).to(rows.device)
    bias = 0 if projection.bias is None else projection.bias
    targets = torch.cat([streams.dense - dense_before - bias, streams.dense - before - bias], -1).flatten(0, 1)
    evidence = Evidence(projection.weight.detach(), columns, *_split(rows, targets, columns, before.shape[:2]))
    healed = method.heal(evidence)
    answer = rows[:, columns] @ healed.weight.T + bias
    if healed.bias is not None:
        answer = answer + healed.bias
    streams.pruned = before + answer.view(before.shape)
    return healed


def _split(rows: torch.Tensor, targets: torch.Tensor, columns: torch.Tensor, shape: torch.Size) -> tuple[Moments, Moments]:
    """The moments of the windows to fit on and of the held-out ones; `shape` is `(n, seq_len)`."""
    held = torch.zeros(shape, dtype=torch.bool, device=rows.device)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    if not held.any():  # fewer windows than HELD_OUT: the later part of each
        held[:, -max(1, shape[1] // HELD_OUT) :] = True
    moments = []
    for part in (~held.flatten(), held.flatten()):
        moments.append(Moments(kept=columns))
        moments[-1].add(rows[part], targets=targets[part])
    return moments[0], moments[1]


def _assign(linear: nn.Linear, healed: Healed) -> None:
    linear.weight.data = healed.weight.contiguous()
    if healed.bias is not None:
        old = 0 if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(old + healed.bias, requires_grad=False)
