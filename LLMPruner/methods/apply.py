"""Plan to model: walk the layers in order, slice, and heal on what the pruned layers before actually pass on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import nn
from tqdm import tqdm

from LLMPruner import parallel
from LLMPruner.data.windows import held_out_tokens
from LLMPruner.families.family import Sublayer
from LLMPruner.families.slicing import output_projection, slice_sublayer
from LLMPruner.methods.block_distill import BLOCK, HiddenStates, NextTokens, distill_block, training_order
from LLMPruner.methods.evidence import Streams, entering_kept, gather_evidence
from LLMPruner.methods.repair import REPAIRS, Healed, Repair
from LLMPruner.model.forward import LayerRunner
from LLMPruner.plan import PruningPlan

logger = logging.getLogger("LLMPruner")


@torch.no_grad()
def apply_plan(
    runner: LayerRunner,
    plan: PruningPlan,
    *,
    repair: str = "none",
    windows: torch.Tensor | None = None,
    distill_epochs: int = 0,
    distill_model_epochs: int = 0,
    distill_labels: float = 0.0,
    distill_last: int | None = None,
    seed: int = 0,
) -> None:
    """Slice the runner's model to `plan`, in place; with a repair, `windows` `(n, seq_len)` are the calibration tokens.

    Layers are walked in order on pruned activations: what a layer is healed on is what reaches it in the pruned model. The
    dense stream runs beside it, through each layer before that is sliced, and says what the layer should have answered.
    With `distill_epochs`, every few healed layers, from the first that lose something on, then learn the dense model's hidden
    states together, on windows in an order drawn by `seed`. With `distill_model_epochs` all layers, or the `distill_last`,
    learn next-token distributions after that, of which `distill_labels` is the text's own share.
    """
    method, layers = REPAIRS[repair], range(runner.num_layers)
    blocks = list(_blocks(len(layers)))
    learning_blocks = blocks[:-1] if distill_model_epochs else blocks  # behind the last one there is only the head
    last = TAUGHT if distill_model_epochs else _state(plan, blocks[-1], distill_epochs)  # of the layer changed last
    if method is None or not _drifts(plan, layers) or _finished(runner, layers[-1]) == last:
        for index in layers:
            _slice_layer(runner, index, plan)
        return
    streams = _streams(runner, windows)
    learning, hidden_states = _Learning(seed), HiddenStates(streams.held_out)
    for block in blocks:
        learns = block in learning_blocks and _state(plan, block, distill_epochs) == DISTILLED
        entering = streams.pruned if learns else None  # one stream is gigabytes: none is held without need
        for index in tqdm(block, desc=f"apply {block[0]} to {block[-1]}", disable=parallel.quiet(), leave=False):
            _heal_layer(runner, index, plan, method, streams)
        if learns:
            streams.pruned = learning.distill(runner, block, entering, streams, hidden_states, distill_epochs)
    if distill_model_epochs:
        end, goal = layers[-(distill_last or 0) :], NextTokens(streams.held_out, windows, distill_labels)
        learning.distill(runner, end, runner.layers(runner.embed(windows), 0, end.start), streams, goal, distill_model_epochs)


HEALED, DISTILLED, TAUGHT = "healed", "distilled", "taught"  # what was done to a finished layer


def _state(plan: PruningPlan, layers: range, epochs: int) -> str:
    """What is done to a block of layers: it learns where something of it is left, and something up to its end is not."""
    left = any(plan.counts(part.name)[index] for index in layers for part in plan.geometry.table.sublayers)
    return DISTILLED if epochs and left and _drifts(plan, layers) else HEALED


def _drifts(plan: PruningPlan, layers: range) -> bool:
    """Whether any layer up to the last of these loses something, so that what leaves it is no longer the dense model's."""
    geometry = plan.geometry
    return any(min(plan.counts(part.name)[: layers.stop]) < geometry.units(part.name) for part in geometry.table.sublayers)


def _finished(runner: LayerRunner, index: int) -> str | None:
    """What an earlier run of this plan did to a layer; None where nothing of it is left."""
    return None if runner.store.finished is None else runner.store.finished.state(index)


class _Learning:
    """Distillation on the windows that are not held out, in an order that a seed draws, over all of a run."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def distill(
        self,
        runner: LayerRunner,
        layers: range,
        entering: torch.Tensor,
        streams: Streams,
        goal: HiddenStates | NextTokens,
        epochs: int,
    ) -> torch.Tensor:
        """Distill `layers`, unless an earlier run has; `entering` is the pruned stream before them. Returns that after them, of
        the windows that `goal` is judged by."""
        order = training_order(goal.held_out, epochs, self.generator)  # drawn for those, too, that learn nothing more
        state = TAUGHT if isinstance(goal, NextTokens) else DISTILLED
        if all(_finished(runner, index) == state for index in layers):
            return streams.pruned
        with runner.store.edited(layers, state):
            return distill_block(runner, layers, entering, streams.pruned, streams.dense, goal, order=order)


def _streams(runner: LayerRunner, windows: torch.Tensor) -> Streams:
    hidden = runner.embed(parallel.mine(windows))
    return Streams(hidden, hidden, parallel.mine(held_out_tokens(*windows.shape)))


def _blocks(num_layers: int) -> Iterator[range]:
    """Layers that are distilled together, a few at a time. Where they do not divide, the first block is the shorter one."""
    for stop in range(num_layers % BLOCK or BLOCK, num_layers + 1, BLOCK):
        yield range(max(0, stop - BLOCK), stop)


def _heal_layer(runner: LayerRunner, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal a layer, or take it as a run that died left it, and move both streams past it."""
    if _finished(runner, index) is not None:
        _pass_finished(runner, index, plan, method, streams)
        return
    touched = _drifts(plan, range(index + 1))
    with runner.store.edited((index,), HEALED) if touched else nullcontext():
        for sublayer in runner.table.sublayers:
            _heal(runner, sublayer, index, plan, method, streams)


def _pass_finished(runner: LayerRunner, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Put the finished layer in the place of the dense one once the dense stream is past it.

    The pruned stream passes what was healed by the same products as then: to the same bits.
    """
    answers, sublayers = [streams.dense], runner.table.sublayers
    for sublayer in sublayers:
        answers.append(runner.sublayer(index, sublayer, answers[-1]))
    if _finished(runner, index) == HEALED:
        weights = runner.store.finished.read(index)
        for sublayer, answer in zip(sublayers, answers[1:], strict=True):
            _pass_healed(runner, sublayer, index, plan, method, streams, answer, weights)
        runner.store.restore(index, plan)
    else:  # a layer that lost nothing has changed, too
        runner.store.restore(index, plan)
        streams.pruned, streams.dense = runner.layer(index, streams.pruned), answers[-1]
    logger.info("layer %2d is finished already", index)


def _pass_healed(
    runner: LayerRunner,
    sublayer: Sublayer,
    index: int,
    plan: PruningPlan,
    method: Repair,
    streams: Streams,
    answer: torch.Tensor,
    weights: dict[str, torch.Tensor],
) -> None:
    """Move both streams past a sublayer that is dense still, and whose finished layer has these `weights`."""
    if _heals(sublayer, index, plan, method, streams):
        name = f"{sublayer.attribute}.{sublayer.output.name}"
        projection = (weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        projection = [value if value is None else value.to(runner.device) for value in projection]
        entering = entering_kept(runner, sublayer, index, plan, streams.pruned)
        streams.pruned = runner.joined(index, sublayer, streams.pruned, entering, *projection)
        streams.dense = answer
    else:
        _pass_unhealed(runner, sublayer, index, plan, streams, answer)


def _pass_unhealed(
    runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, streams: Streams, answer: torch.Tensor
) -> None:
    """Move both streams past a sublayer that keeps its weights, or of which nothing is left, which changes no stream."""
    if plan.layers[index].kept(sublayer.name):
        same = streams.pruned is streams.dense
        streams.pruned = answer if same else runner.sublayer(index, sublayer, streams.pruned)
    streams.dense = answer


def _heals(sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> bool:
    """Whether a sublayer gets other output weights: it loses something but not all, or the stream that reaches it drifted."""
    kept, drifted = len(plan.layers[index].kept(sublayer.name)), streams.pruned is not streams.dense
    return kept > 0 and (kept < plan.geometry.units(sublayer.name) or (drifted and method.solves))


def _heal(runner: LayerRunner, sublayer: Sublayer, index: int, plan: PruningPlan, method: Repair, streams: Streams) -> None:
    """Slice and heal one sublayer, and move both streams past it, the dense one through the dense weights."""
    if not _heals(sublayer, index, plan, method, streams):
        answer = runner.sublayer(index, sublayer, streams.dense)
        _slice(runner, sublayer, index, plan)
        _pass_unhealed(runner, sublayer, index, plan, streams, answer)
        return
    evidence, answer, entering = gather_evidence(runner, sublayer, index, plan, method, streams)
    healed = method.heal(evidence)
    del evidence  # gigabytes, before the streams move on
    _slice(runner, sublayer, index, plan)
    with runner.store.layer(index) as layer:
        projection = output_projection(layer, sublayer)
        _assign(projection, healed)
        streams.pruned = runner.joined(index, sublayer, streams.pruned, entering, projection.weight, projection.bias)
    streams.dense = answer
    logger.info("layer %2d %s healed: %s", index, sublayer.name, healed.choice)


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


def _assign(linear: nn.Linear, healed: Healed) -> None:
    """Give a projection what was solved for it: all processes take the first one's, for other devices round otherwise."""
    linear.weight.data = parallel.from_main(healed.weight.contiguous())
    if healed.bias is not None:
        old = 0 if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(old + parallel.from_main(healed.bias), requires_grad=False)
