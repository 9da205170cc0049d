"""Distillation after the closed forms: what is kept of some layers in a row learns from the dense model, by gradient steps.

Blocks of a few layers learn hidden states: each is given what the pruned layers before pass on and is to give back the dense
model's (block reconstruction: BRECQ, Li et al. 2021). No gradient goes through the whole model, and never more than one block
is in float32. It moves what no closed form does, all of a layer's weights at once, and errors that the next layers undo cost
nothing. Layers that end at the head learn next-token distributions through it, those of the dense model mixed with the text's
own next tokens (Hinton et al. 2015). Of these layers output projections and norms alone learn: a third of the memory, most of
the gain, and less is lost of what the text does not show.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from tqdm import tqdm

from LLMPruner.data.windows import IGNORED
from LLMPruner.families.slicing import is_removed, output_projection
from LLMPruner.model.device import deterministic, float64
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.hidden import fetch

logger = logging.getLogger("LLMPruner")

# Layers that learn hidden states together. Their weights, gradients and Adam's moments in float32 and two
# half-precision copies take 20 bytes a parameter, beside the model and the hidden states: of Llama-3-8B at 25%, 3.3 GB a layer.
BLOCK = 5
RATE, WARMUP = 5e-4, 10  # of Adam, one window a step; steps until the full rate, which then falls to nothing
HEAD_RATE = 3e-4  # of layers that learn through the head
FLOOR = 0.01  # relative squared distance below which a token is near enough
# Of a window every so many tokens go through the head, other ones from step to step: neighbours say much the same, and the head
# is what costs.
STRIDE = 4


@dataclass(frozen=True)
class _Goal:
    """What layers learn. `held_out` `(n, seq_len)` are the tokens to judge by; of the others every `stride`th teaches.

    Layers whose distance is below `enough` learn nothing more.
    """

    held_out: torch.Tensor
    stride, enough = 1, -math.inf

    def taught(self, window: int, step: int) -> torch.Tensor:
        """The tokens of a window that teach in a step: other ones from step to step."""
        fitted = (~self.held_out[window]).nonzero().flatten()
        return fitted[step % min(self.stride, len(fitted)) :: self.stride]


@dataclass(frozen=True)
class HiddenStates(_Goal):
    """What a block learns: the dense model's hidden states after it."""

    rate, outputs_only, distance_name = RATE, False, "log distance to"
    enough = math.log(2 * FLOOR)  # nearer, most of the loss is the floor, and steps only stir what was solved
    judged = slice(None)  # windows whose distance is asked for: all, for the next block needs what comes after them anyway

    def pull(self, runner: LayerRunner, hidden: torch.Tensor, targets: torch.Tensor, window: int, tokens: torch.Tensor) -> None:
        """Go back from the hidden states `(tokens, hidden)` of some tokens of a window, which should be `targets`."""
        _log_distances(hidden, targets).mean().backward()

    def distance(self, runner: LayerRunner, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        """How far `hidden` is from `targets` on the tokens held out, both of the windows `judged`: batch by batch."""
        total, held_out = 0.0, self.held_out
        for batch in runner.batches(*held_out.shape):
            ours, theirs = (fetch(states, batch, runner.device) for states in (hidden, targets))
            total += float64(_log_distances(ours, theirs)[held_out[batch].to(runner.device)]).sum().item()
        return total / held_out.sum().item()


@dataclass(frozen=True)
class NextTokens(_Goal):
    """What layers before the head learn: next-token distributions, of which `labels`, 0 to 1, is the share of the next tokens
    of the text itself, `windows` `(n, seq_len)`; the rest is the dense model's. Learned and judged on every few tokens."""

    windows: torch.Tensor
    labels: float = 0.0
    stride, rate, outputs_only, distance_name = STRIDE, HEAD_RATE, True, "loss against"

    @property
    def judged(self) -> torch.Tensor:
        """The windows whose distance is asked for, bool `(n,)`: behind the head nothing needs the others again."""
        return self.held_out.any(1)

    def pull(self, runner: LayerRunner, hidden: torch.Tensor, targets: torch.Tensor, window: int, tokens: torch.Tensor) -> None:
        """Go back from the last hidden states `(tokens, hidden)` of some tokens of a window, which should be `targets`."""
        hidden.backward(runner.head.teaching_gradient(hidden, targets, self._next(window)[tokens], self.labels))

    def distance(self, runner: LayerRunner, hidden: torch.Tensor, targets: torch.Tensor) -> float:
        """What is learned by, of the tokens held out: of last hidden states, both of the windows `judged`."""
        chosen = self.held_out[self.judged].flatten().nonzero().flatten()[:: self.stride]
        ours, theirs = (states.flatten(0, 1)[chosen.to(states.device)] for states in (hidden, targets))
        return runner.head.teaching_loss(ours, theirs, self._next(self.judged).flatten()[chosen], self.labels)

    def _next(self, windows: int | torch.Tensor) -> torch.Tensor:
        """The label of every token; the last of a window has none."""
        return functional.pad(self.windows[windows][..., 1:], (0, 1), value=IGNORED)


def distill_block(
    runner: LayerRunner,
    layers: range,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    goal: HiddenStates | NextTokens,
    *,
    order: Sequence[int],
) -> torch.Tensor:
    """Train `layers`, in place, on the tokens that are not held out; keep the result where it is better on those that are.

    Nothing is trained where they are near enough already. A least-squares repair's last solution has seen them too, so the
    verdict errs towards what was healed.

    Args:
        inputs, outputs: hidden states `(n, seq_len, hidden)` of the pruned model before and after the layers.
        targets: those of the dense model after them.
        goal: what the layers learn of these; next tokens only where the head comes next.
        order: the windows, one a step: of `training_order`.
    Returns:
        What the layers now give, of the windows `goal.judged`: if they learned nothing, `outputs` as a resumed run rounds it.
    """
    judged = goal.judged
    passed = partial(runner.layers, inputs[judged], layers.start, layers.stop)
    before, told = goal.distance(runner, outputs[judged], targets[judged]), (layers[0], layers[-1], goal.distance_name)
    if before < goal.enough:
        logger.info("layers %d to %d need no distillation: %s dense %.5f", *told, before)
        return passed()
    with _float32(runner, layers, outputs_only=goal.outputs_only) as weights, deterministic():
        _train(runner, layers, list(weights), inputs, targets, goal, order)
    distilled = passed()
    after = goal.distance(runner, distilled, targets[judged])
    kept = after < before  # not where it is NaN
    logger.info("layers %d to %d distilled: %s dense %.5f to %.5f%s", *told, before, after, "" if kept else ", not kept")
    if kept:
        return distilled
    for weight, healed in weights.items():
        weight.data = healed
    return passed()


def training_order(held_out: torch.Tensor, epochs: int, generator: torch.Generator) -> list[int]:
    """The windows that are not held out whole, in a random order drawn anew for each epoch."""
    fit = (~held_out).any(1).nonzero().flatten()
    return torch.cat([fit[torch.randperm(len(fit), generator=generator)] for _ in range(epochs)]).tolist()


@contextmanager
def _float32(runner: LayerRunner, layers: range, *, outputs_only: bool) -> Iterator[dict[torch.nn.Parameter, torch.Tensor]]:
    """The weights that learn, trainable and in float32 as long as the context is open, with the values they had before.

    Afterwards what was learned is in the model's dtype; after an exception the weights are what they were.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(runner.store.layer(index)) for index in layers]
        learning = (weight for layer in opened for weight in _learning(runner, layer, outputs_only=outputs_only))
        before = {weight: (weight.data, weight.requires_grad) for weight in learning}
        try:
            for weight in before:
                weight.data = weight.data.to(torch.float32, copy=True)
                weight.requires_grad_(True)
            yield {weight: value for weight, (value, _) in before.items()}
            for weight, (value, _) in before.items():
                weight.data = weight.data.to(value.dtype)
        except BaseException:
            for weight, (value, _) in before.items():
                weight.data = value
            raise
        finally:
            for weight, (_, trainable) in before.items():
                weight.grad = None
                weight.requires_grad_(trainable)


def _learning(runner: LayerRunner, layer: torch.nn.Module, *, outputs_only: bool) -> Iterator[torch.nn.Parameter]:
    """The parameters of a decoder layer that learn."""
    if not outputs_only:
        yield from layer.parameters()
        return
    for sublayer in runner.table.sublayers:
        if not is_removed(getattr(layer, sublayer.attribute)):
            yield from output_projection(layer, sublayer).parameters()
            for norm in (sublayer.norm, *sublayer.wraps):
                yield from getattr(layer, norm).parameters()


def _train(
    runner: LayerRunner,
    layers: range,
    weights: list[torch.nn.Parameter],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    goal: HiddenStates | NextTokens,
    order: Sequence[int],
) -> None:
    """Adam on float32 weights; the arithmetic of a half-precision model stays in half precision."""
    optimizer = torch.optim.Adam(weights, lr=goal.rate, betas=(0.9, 0.95), fused=True)
    rate = lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / len(order))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    half = torch.autocast(runner.device.type, torch.bfloat16, enabled=inputs.dtype != torch.float32)
    for step, window in enumerate(tqdm(order, desc=f"distill {layers[0]} to {layers[-1]}", disable=None, leave=False)):
        tokens, one = goal.taught(window, step), slice(window, window + 1)
        optimizer.zero_grad()
        with torch.enable_grad():
            seen = tokens.to(runner.device)
            hidden, wanted = fetch(inputs, one, runner.device), fetch(targets, one, runner.device)[0, seen]
            with half:
                for index in layers:
                    hidden = runner.differentiable_layer(index, hidden)
            goal.pull(runner, hidden[0, seen], wanted, window, tokens)
        optimizer.step()
        schedule.step()


def _log_distances(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logarithm of each token's squared distance to its target, relative to that: the next norm divides by its length.

    Of the logarithm, because a few tokens stay far from their targets whatever the weights are, and would outweigh the rest.
    """
    targets = targets.float()
    scale = targets.square().mean(-1).clamp_min(1e-20)  # a stream of zeros; its inverse must not overflow
    return (FLOOR + (hidden.float() - targets).square().mean(-1) / scale).log()
