"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner.data.windows import held_out_tokens
from LLMPruner.families.family import Sublayer
from LLMPruner.families.slicing import output_columns, output_projection, slice_sublayer
from LLMPruner.methods.block_distill import BLOCK, distill_block
from LLMPruner.methods.moments import Moments, relative_to, token_scales
from LLMPruner.methods.repair import REPAIRS, Evidence, Healed, Repair
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.hidden import fetch
from LLMPruner.plan import PruningPlan

logger = logging.getLogger("LLMPruner")


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
    distill_model_epochs: int = 0,
    seed: int = 0,
) -> None:
    """Slice the runner's model to `plan`, in place; with a repair, `windows` `(n, seq_len)` are the calibration tokens.

    Layers are walked in order on pruned activations: what a layer is healed on is what reaches it in the pruned model. The
    dense stream runs beside it, through each layer before that is sliced, and says what the layer should have answered.
    With `distill_epochs`, every few healed layers are then distilled together, on windows in an order drawn by `seed`: from
    the first few that lost something on, whole layers among them learn too. With `distill_model_epochs`, output projections and
    norms of all layers then learn the dense model's next-token distributions together.
    """
    method, sublayers = REPAIRS[repair], plan.geometry.table.sublayers
    if method is None:
        for index, sublayer in product(range(runner.num_layers), sublayers):
            _slice(runner, sublayer, index, plan)
        return
    streams, held_out = _streams(runner, windows), held_out_tokens(*windows.shape).to(runner.device)
    options = {"held_out": held_out, "generator": torch.Generator().manual_seed(seed)}
    with tqdm(total=runner.num_layers, desc="apply", disable=None, leave=False) as progress:
        for layers in _blocks(runner.num_layers):
            learns = distill_epochs and any(plan.layers[index].kept(part.name) for index in layers for part in sublayers)
            entering = streams.pruned if learns else None  # one stream is gigabytes: none is held without need
            for index, sublayer in product(layers, sublayers):
                _heal(runner, sublayer, index, plan, method, streams)
            progress.update(len(layers))
            if learns:
                _distill(runner, layers, entering, streams, epochs=distill_epochs, **options)
    if distill_model_epochs:
        whole, entering = range(runner.num_layers), runner.embed(windows)
        _distill(runner, whole, entering, streams, epochs=distill_model_epochs, outputs_only=True, **options)


def _distill(runner: LayerRunner, layers: range, entering: torch.Tensor, streams: Streams, **options: Any) -> None:
    """Distill `layers`, unless nothing was pruned yet; `entering` is the pruned stream before them."""
    if streams.pruned is not streams.dense:
        streams.pruned = distill_block(runner, layers, entering, streams.pruned, streams.dense, **options)


def _streams(runner: LayerRunner, windows: torch.Tensor) -> Streams:
    hidden = runner.embed(windows)
    return Streams(hidden, hidden)


def _blocks(num_layers: int) -> Iterator[range]:
    """Layers that are distilled together. Where they do not divide, the first block is the shorter one: the last block is
    taught the dense model's next-token distributions, which changes most and wants all its layers."""
    for stop in range((num_layers - 1) % BLOCK + 1, num_layers + 1, BLOCK):
        yield range(max(0, stop - BLOCK), stop)


def _heal(runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal one sublayer, and move both streams past it, the dense one through the dense weights."""
    kept, healed = plan.layers[index].kept(sublayer.name), None
    whole, drifted = len(kept) == plan.geometry.units(sublayer.name), streams.pruned is not streams.dense
    if kept and (not whole or (drifted and method.solves)):
        evidence, answer = _evidence(runner, sublayer, index, plan, method, streams)
        healed = method.heal(evidence)
    else:
        answer = runner.sublayer(index, sublayer, streams.dense)
    _slice(runner, sublayer, index, plan)
    if healed is not None:
        with runner.store.layer(index) as layer:
            _assign(output_projection(layer, sublayer), healed)
        logger.info("layer %2d %s healed: %s", index, sublayer.name, healed.choice)
    streams.pruned = runner.sublayer(index, sublayer, streams.pruned) if drifted or not whole else answer
    streams.dense = answer


def _slice(runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan) -> None:
    kept = plan.layers[index].kept(sublayer.name)
    if len(kept) < plan.geometry.units(sublayer.name):
        with runner.store.layer(index) as layer:
            slice_sublayer(layer, sublayer, kept, plan.geometry)


def _evidence(
    runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams
) -> tuple[Evidence, torch.Tensor]:
    """What a repair may know of a dense sublayer, and the dense stream after it. Gathered batch by batch.

    The target is what the projection itself gave on the dense stream, not the difference of the stream after and before: where
    the stream is 64 times as long as what is added to it, a third of that difference is bfloat16's rounding.
    """
    columns = output_columns(sublayer, plan.layers[index].kept(sublayer.name), plan.geometry).to(runner.device)
    dense, pruned, answer = streams.dense, streams.pruned, torch.empty_like(streams.dense)
    held = held_out_tokens(*dense.shape[:2]).to(runner.device)
    with runner.store.layer(index) as layer:
        projection = output_projection(layer, sublayer)
        chosen = columns if method.solves and len(columns) < projection.in_features else None
        fit, held_out = (Moments(gram=method.solves, kept=chosen) for _ in range(2))
        bias = 0 if projection.bias is None else projection.bias.float()
        for part in runner.batches(*dense.shape[:2]):
            before = fetch(dense, part, runner.device)
            seen = theirs = runner.observed(index, sublayer, before)
            answer[part] = theirs.after
            now, drift = before, 0
            if pruned is not dense:
                now = fetch(pruned, part, runner.device)
                seen = runner.observed(index, sublayer, now)
                if not sublayer.wraps:  # else what is added to the stream is not what the projection gives
                    drift = before.float() - now.float()
            own, inputs, targets = theirs.outputs.float() - bias, seen.inputs, None
            if method.solves:
                scales = token_scales(before, now, theirs.after)
                inputs = relative_to(scales, inputs)
                targets = relative_to(scales, torch.cat([own, own + drift], -1)).flatten(0, 1)  # (tokens, 2 * hidden)
            inputs, out = inputs.flatten(0, 1), held[part].flatten()
            for moments, tokens in ((fit, ~out), (held_out, out)):
                moments.add(inputs[tokens], targets=None if targets is None else targets[tokens])
        return Evidence(projection.weight.detach(), columns, fit, held_out), answer


def _assign(linear: nn.Linear, healed: Healed) -> None:
    linear.weight.data = healed.weight.contiguous()
    if healed.bias is not None:
        old = 0 if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(old + healed.bias, requires_grad=False)
