"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner.forward import LayerRunner
from LLMPruner.methods.distill import LAYERS, distill
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
def apply_plan(
    runner: LayerRunner,
    plan: PruningPlan,
    *,
    repair: str = "none",
    windows: torch.Tensor | None = None,
    distill_epochs: int = 0,
    seed: int = 0,
) -> None:
    """Slice the runner's model to `plan`, in place; with a repair, `windows` `(n, seq_len)` are the calibration tokens.

    Layers are walked in order on pruned activations: what a layer is healed on is what reaches it in the pruned model. The
    dense stream runs beside it, through each layer before that is sliced, and says what the layer should have answered.
    With `distill_epochs`, every few healed layers are then distilled together, on windows in an order drawn by `seed`: from
    the first few that lost something on, whole layers among them learn too.
    """
    method = REPAIRS[repair]
    if method is None:
        for index, kind in product(range(runner.num_layers), KINDS.values()):
            _slice(runner, kind, index, plan)
        return
    streams, held_out = _streams(runner, windows), _held_out(*windows.shape).to(runner.device)
    options = {"epochs": distill_epochs, "generator": torch.Generator().manual_seed(seed)}
    with tqdm(total=runner.num_layers, desc="apply", disable=None, leave=False) as progress:
        for layers in _blocks(runner.num_layers):
            learns = distill_epochs and any(kind.kept(plan, index) for index in layers for kind in KINDS.values())
            entering = streams.pruned if learns else None  # one stream is gigabytes: none is held without need
            for index in layers:
                for kind in KINDS.values():
                    _heal(runner, kind, index, plan, method, streams)
                progress.update()
            if learns and streams.pruned is not streams.dense:
                streams.pruned = distill(runner, layers, entering, streams.pruned, streams.dense, held_out, **options)


def _streams(runner: LayerRunner, windows: torch.Tensor) -> Streams:
    hidden = runner.embed(windows)
    return Streams(hidden, hidden)


def _blocks(num_layers: int) -> Iterator[range]:
    """Layers that are distilled together. A shorter block comes first: the last one moves the words."""
    for stop in range((num_layers - 1) % LAYERS + 1, num_layers + 1, LAYERS):
        yield range(max(0, stop - LAYERS), stop)


def _heal(runner: LayerRunner, kind: Kind, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal one sublayer, and move both streams past it, the dense one through the dense weights."""
    step, kept, healed = kind.step(runner), kind.kept(plan, index), None
    whole, drifted = len(kept) == kind.units(plan.geometry), streams.pruned is not streams.dense
    answer = step(index, streams.dense)
    if kept and (not whole or (drifted and method.solves)):
        healed = method.heal(_evidence(runner, kind, index, plan, method, streams, answer))
    _slice(runner, kind, index, plan)
    if healed is not None:
        _assign(kind.projection(runner.decoder_layer(index)), healed)
        logger.info("layer %2d %s healed: %s", index, kind.name, healed.choice)
    streams.pruned = step(index, streams.pruned) if drifted or not whole else answer
    streams.dense = answer


def _slice(runner: LayerRunner, kind: Kind, index: int, plan: PruningPlan) -> None:
    kept = kind.kept(plan, index)
    if len(kept) < kind.units(plan.geometry):
        kind.prune(runner.decoder_layer(index), kept, plan.geometry)


def _evidence(
    runner: LayerRunner,
    kind: Kind,
    index: int,
    plan: PruningPlan,
    method: Repair,
    streams: Streams,
    answer: torch.Tensor,
) -> Evidence:
    """What a repair may know of a dense sublayer; `answer` is the dense stream after it. Gathered batch by batch."""
    projection = kind.projection(runner.decoder_layer(index))
    columns = kind.columns(kind.kept(plan, index), plan.geometry).to(runner.device)
    chosen = columns if method.solves and len(columns) < projection.in_features else None
    fit, held_out = (Moments(gram=method.solves, kept=chosen) for _ in range(2))
    held = _held_out(*answer.shape[:2]).to(runner.device)
    batches = runner.batches(*answer.shape[:2])
    bias = 0 if projection.bias is None else projection.bias

    def add(inputs: torch.Tensor) -> None:
        batch, targets = next(batches), None
        if method.solves:
            moves = [answer[batch] - before[batch] - bias for before in (streams.dense, streams.pruned)]
            targets = torch.cat(moves, -1).flatten(0, 1)  # (tokens, 2 * hidden)
        for moments, part in ((fit, ~held[batch].flatten()), (held_out, held[batch].flatten())):
            moments.add(inputs[part], targets=None if targets is None else targets[part])

    kind.step(runner)(index, streams.pruned, add)
    return Evidence(projection.weight.detach(), columns, fit, held_out)


def _held_out(windows: int, seq_len: int) -> torch.Tensor:
    """Which tokens the repair does not fit on but chooses by, bool `(windows, seq_len)`."""
    held = torch.zeros(windows, seq_len, dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    if not held.any():  # fewer windows than HELD_OUT: the later part of each
        held[:, -max(1, seq_len // HELD_OUT) :] = True
    return held


def _assign(linear: nn.Linear, healed: Healed) -> None:
    linear.weight.data = healed.weight.contiguous()
    if healed.bias is not None:
        old = 0 if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(old + healed.bias, requires_grad=False)
