"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner import parallel
from LLMPruner.data.windows import held_out_tokens
from LLMPruner.families.family import Sublayer
from LLMPruner.families.slicing import output_columns, output_projection, slice_sublayer
from LLMPruner.methods.block_distill import BLOCK, distill_block, training_order
from LLMPruner.methods.moments import Moments, relative_to, token_scales
from LLMPruner.methods.repair import REPAIRS, Evidence, Healed, Repair
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.hidden import fetch
from LLMPruner.plan import PruningPlan

logger = logging.getLogger("LLMPruner")


@dataclass
class Streams:
    """This process's calibration windows: hidden states `(n, seq_len, hidden)` in the dense and in the pruned model, and
    which tokens `(n, seq_len)` are held out."""

    dense: torch.Tensor
    pruned: torch.Tensor
    held_out: torch.Tensor


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
    method, layers = REPAIRS[repair], range(runner.num_layers)
    if method is None:
        distill_epochs = distill_model_epochs = 0
    taught = distill_model_epochs and _drifts(plan, layers)
    last = [TAUGHT] * len(layers) if taught else list(_last_states(plan, distill_epochs))
    if method is None or all(state in (None, _finished(runner, index)) for index, state in enumerate(last)):
        for index in layers:
            _slice_layer(runner, index, plan)
        return
    streams = _streams(runner, windows)
    learning = _Learning(streams.held_out, seed)
    for block in _blocks(len(layers)):
        learns = _state(plan, block, distill_epochs) == DISTILLED
        entering = streams.pruned if learns else None  # one stream is gigabytes: none is held without need
        for index in tqdm(block, desc=f"apply {block[0]} to {block[-1]}", disable=parallel.quiet(), leave=False):
            _heal_layer(runner, index, plan, method, streams)
        if learns:
            learning.distill(runner, block, entering, streams, DISTILLED, distill_epochs)
    if taught:
        entering = runner.embed(windows)
        learning.distill(runner, layers, entering, streams, TAUGHT, distill_model_epochs, outputs_only=True)


HEALED, DISTILLED, TAUGHT = "healed", "distilled", "taught"  # what was done to a finished layer


def _state(plan: PruningPlan, layers: range, epochs: int) -> str:
    """What is done to a block of layers: it learns where something of it is left, and something up to its end is not."""
    left = any(plan.counts(part.name)[index] for index in layers for part in plan.geometry.table.sublayers)
    return DISTILLED if epochs and left and _drifts(plan, layers) else HEALED


def _last_states(plan: PruningPlan, epochs: int) -> Iterator[str | None]:
    """What is done to each layer where the model as a whole does not learn; None: nothing."""
    for block in _blocks(plan.geometry.num_layers):
        state = _state(plan, block, epochs)
        yield from (state if state == DISTILLED or _drifts(plan, range(index + 1)) else None for index in block)


def _drifts(plan: PruningPlan, layers: range) -> bool:
    """Whether any layer up to the last of these loses something, so that what leaves it is no longer the dense model's."""
    geometry = plan.geometry
    return any(min(plan.counts(part.name)[: layers.stop]) < geometry.units(part.name) for part in geometry.table.sublayers)


def _finished(runner: LayerRunner, index: int) -> str | None:
    """What an earlier run of this plan did to a layer; None where nothing of it is left."""
    return None if runner.store.finished is None else runner.store.finished.state(index)


class _Learning:
    """Distillation on the windows that are not held out, in an order that a seed draws, over all blocks of a run."""

    def __init__(self, held_out: torch.Tensor, seed: int) -> None:
        self.held_out, self.generator = held_out, torch.Generator().manual_seed(seed)

    def distill(
        self,
        runner: LayerRunner,
        layers: range,
        entering: torch.Tensor,
        streams: Streams,
        state: str,
        epochs: int,
        **options: Any,
    ) -> None:
        """Distill `layers`, unless an earlier run has; `entering` is the pruned stream before them."""
        order = training_order(self.held_out, epochs, self.generator)  # drawn for those, too, that learn nothing more
        if all(_finished(runner, index) == state for index in layers):
            return
        with runner.store.edited(layers, state):
            targets = (streams.pruned, streams.dense, self.held_out)
            streams.pruned = distill_block(runner, layers, entering, *targets, order=order, **options)


def _streams(runner: LayerRunner, windows: torch.Tensor) -> Streams:
    hidden = runner.embed(parallel.mine(windows))
    return Streams(hidden, hidden, parallel.mine(held_out_tokens(*windows.shape)))


def _blocks(num_layers: int) -> Iterator[range]:
    """Layers that are distilled together. Where they do not divide, the first block is the shorter one: the last block is
    taught the dense model's next-token distributions, which changes most and wants all its layers."""
    for stop in range((num_layers - 1) % BLOCK + 1, num_layers + 1, BLOCK):
        yield range(max(0, stop - BLOCK), stop)


def _heal_layer(runner: LayerRunner, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal a layer, or take it as a run that died left it, and move both streams past it."""
    if _finished(runner, index) is not None:
        _pass_finished(runner, index, plan, streams)
        return
    touched = _drifts(plan, range(index + 1))
    with runner.store.edited((index,), HEALED) if touched else nullcontext():
        for sublayer in runner.table.sublayers:
            _heal(runner, sublayer, index, plan, method, streams)


def _pass_finished(runner: LayerRunner, index: int, plan: PruningPlan, streams: Streams) -> None:
    """Put the finished layer in the place of the dense one once the dense stream is past it."""
    answers, sublayers = [streams.dense], runner.table.sublayers
    for sublayer in sublayers:
        answers.append(runner.sublayer(index, sublayer, answers[-1]))
    runner.store.restore(index, plan)
    learned = _finished(runner, index) != HEALED  # then a layer that lost nothing may have changed too
    for sublayer, answer in zip(sublayers, answers[1:], strict=True):
        _pass(runner, sublayer, index, plan, streams, answer, changed=learned)
    logger.info("layer %2d is finished already", index)


def _pass(
    runner: LayerRunner,
    sublayer: Sublayer,
    index: int,
    plan: PruningPlan,
    streams: Streams,
    answer: torch.Tensor,
    *,
    changed: bool = False,
) -> None:
    """Move both streams past a pruned sublayer, the dense one to `answer`; as long as nothing was `changed` they are one."""
    changed |= streams.pruned is not streams.dense
    changed |= plan.counts(sublayer.name)[index] < plan.geometry.units(sublayer.name)
    streams.pruned = runner.sublayer(index, sublayer, streams.pruned) if changed else answer
    streams.dense = answer


def _heal(runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal one sublayer, and move both streams past it, the dense one through the dense weights."""
    kept, healed = plan.layers[index].kept(sublayer.name), None
    whole, drifted = len(kept) == plan.geometry.units(sublayer.name), streams.pruned is not streams.dense
    if kept and (not whole or (drifted and method.solves)):
        evidence, answer = _evidence(runner, sublayer, index, plan, method, streams)
        healed = method.heal(evidence)
        del evidence  # gigabytes, before the streams move on
    else:
        answer = runner.sublayer(index, sublayer, streams.dense)
    _slice(runner, sublayer, index, plan)
    if healed is not None:
        with runner.store.layer(index) as layer:
            _assign(output_projection(layer, sublayer), healed)
        logger.info("layer %2d %s healed: %s", index, sublayer.name, healed.choice)
    _pass(runner, sublayer, index, plan, streams, answer)


def _slice_layer(runner: LayerRunner, index: int, plan: PruningPlan) -> None:
    """Slice a layer, or take it as a run that died left it."""
    if _finished(runner, index) is not None:
        runner.store.restore(index, plan)
    elif any(plan.counts(part.name)[index] < plan.geometry.units(part.name) for part in runner.table.sublayers):
        with runner.store.edited((index,), HEALED):
            for sublayer in runner.table.sublayers:
                _slice(runner, sublayer, index, plan)


def keep_layers(runner: LayerRunner) -> None:
    """Keep all layers as they are, in the place of what the store kept before."""
    with runner.store.edited(range(runner.num_layers), HEALED):
        pass


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
    dense, pruned, answer = streams.dense, streams.pruned, runner.home.empty_like(streams.dense)
    held = streams.held_out.to(runner.device)
    with runner.store.layer(index) as layer:
        projection = output_projection(layer, sublayer)
        chosen = columns if method.solves and len(columns) < projection.in_features else None
        fit, held_out = (Moments(gram=method.solves, kept=chosen) for _ in range(2))
        bias = 0 if projection.bias is None else projection.bias.float()

        def look(part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            before = fetch(dense, part, runner.device)
            theirs = runner.observed(index, sublayer, before)
            now, inputs, drift = before, theirs.inputs, 0
            if pruned is not dense:
                now = fetch(pruned, part, runner.device)
                inputs = runner.entering(index, sublayer, now)
                if not sublayer.wraps:  # else what is added to the stream is not what the projection gives
                    drift = before.float() - now.float()
            if not method.solves:
                return theirs.after, inputs, None
            own, scales = theirs.outputs.float() - bias, token_scales(before, now, theirs.after)
            targets = torch.cat([own, own + drift], -1)  # (windows, seq_len, 2 * hidden)
            return theirs.after, relative_to(scales, inputs), relative_to(scales, targets)

        for part, (after, inputs, targets) in runner.computed(*dense.shape[:2], look):
            answer[part], out = after, held[part].flatten()
            for moments, tokens in ((fit, ~out), (held_out, out)):
                wanted = None if targets is None else targets.flatten(0, 1)[tokens]
                moments.add(inputs.flatten(0, 1)[tokens], targets=wanted)
            del after, inputs, targets
        return Evidence(projection.weight.detach(), columns, fit.pool(), held_out.pool()), answer


def _assign(linear: nn.Linear, healed: Healed) -> None:
    """Give a projection what was solved for it: all processes take the first one's, for other devices round otherwise."""
    linear.weight.data = parallel.from_main(healed.weight.contiguous())
    if healed.bias is not None:
        old = 0 if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(old + parallel.from_main(healed.bias), requires_grad=False)
