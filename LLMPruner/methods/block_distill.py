"""Blockwise distillation: the kept weights of a few layers in a row learn to answer as those layers did in the dense model.

Gradient steps, but no gradient through the whole model, and never more than one block in float32. Each block is given what the
pruned layers before pass on and is to give back the dense model's hidden states (block reconstruction: BRECQ, Li et al. 2021).
It moves what no closed form does, all of a layer's weights at once, and errors that the next layers undo cost nothing. Behind
the last layers there is only the head: they learn next-token distributions through it instead of hidden states, those of the
dense model mixed with the text's own next tokens (Hinton et al. 2015). Of these layers output projections and norms alone
learn: a third of the memory, most of the gain, and less is lost of what the text does not show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm import tqdm

from LLMPruner.data.windows import IGNORED
from LLMPruner.families.slicing import is_removed, output_projection
from LLMPruner.model.device import deterministic, float64
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.hidden import fetch

logger = logging.getLogger("LLMPruner")

# Layers that learn together, before the last ones. Their weights, gradients and Adam's moments in float32 and two
# half-precision copies take 20 bytes a parameter, beside the model and the hidden states: of Llama-3-8B at 25%, 3.3 GB a layer.
BLOCK = 5
RATE, WARMUP = 5e-4, 10  # of Adam, one window a step; steps until the full rate, which then falls to nothing
LAST_RATE = 3e-4  # of the last layers
FLOOR = 0.01  # relative squared distance below which a token is near enough
# Of a window every so many tokens go through the head, other ones from step to step: neighbours say much the same, and the head
# is what costs.
STRIDE = 4


@dataclass(frozen=True)
class Text:
    """The windows `(n, seq_len)` of tokens that are distilled on, which of them are held out, and by how much the text's own
    next tokens count where layers learn next-token distributions, beside the dense model's: 0 to 1."""

    windows: torch.Tensor
    held_out: torch.Tensor
    labels: float = 0.0

    @property
    def next_tokens(self) -> torch.Tensor:
        """The label of every token; the last of a window has none."""
        return functional.pad(self.windows[:, 1:], (0, 1), value=IGNORED)


def distill_block(
    runner: LayerRunner,
    layers: range,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    text: Text,
    *,
    order: Sequence[int],
) -> torch.Tensor:
    """Train `layers`, in place, on the tokens that are not held out; keep the result where it is better on those that are.

    A least-squares repair's last solution has seen these too, so the verdict errs towards what was healed.

    Args:
        inputs, outputs: hidden states `(n, seq_len, hidden)` of the pruned model before and after the layers.
        targets: those of the dense model after them. Of the model's last layers the distance is KL(dense || model), with its
            share of the text's cross-entropy.
        text: what all of these are of.
        order: the windows, one a step: of `training_order`.
    Returns:
        What the layers now give, in place of `outputs`.
    """
    before = _distance(runner, layers, outputs, targets, text)
    with _float32(runner, layers) as weights, deterministic():
        _train(runner, layers, list(weights), inputs, targets, text, order)
    distilled = runner.layers(inputs, layers.start, layers.stop)
    after = _distance(runner, layers, distilled, targets, text)
    verdict, name = "" if after < before else ", not kept", "loss against" if _last(runner, layers) else "log distance to"
    logger.info("layers %d to %d distilled: %s dense %.5f to %.5f%s", layers[0], layers[-1], name, before, after, verdict)
    if after < before:  # not where it is NaN
        return distilled
    for weight, healed in weights.items():
        weight.data = healed
    return runner.layers(inputs, layers.start, layers.stop)  # as a resumed run has it, which is `outputs` but for rounding


def training_order(held_out: torch.Tensor, epochs: int, generator: torch.Generator) -> list[int]:
    """The windows that are not held out whole, in a random order drawn anew for each epoch."""
    fit = (~held_out).any(1).nonzero().flatten()
    return torch.cat([fit[torch.randperm(len(fit), generator=generator)] for _ in range(epochs)]).tolist()


@contextmanager
def _float32(runner: LayerRunner, layers: range) -> Iterator[dict[torch.nn.Parameter, torch.Tensor]]:
    """The weights that learn, trainable and in float32 as long as the context is open, with the values they had before.

    Afterwards what was learned is in the model's dtype; after an exception the weights are what they were.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(runner.store.layer(index)) for index in layers]
        learning = (weight for layer in opened for weight in _learning(runner, layer, outputs_only=_last(runner, layers)))
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
    text: Text,
    order: Sequence[int],
) -> None:
    """Adam on float32 weights; the arithmetic of a half-precision model stays in half precision."""
    last, labels = _last(runner, layers), text.next_tokens
    optimizer = torch.optim.Adam(weights, lr=LAST_RATE if last else RATE, betas=(0.9, 0.95), fused=True)
    rate = lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / len(order))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    half = torch.autocast(runner.device.type, torch.bfloat16, enabled=inputs.dtype != torch.float32)
    for step, window in enumerate(tqdm(order, desc=f"distill {layers[0]} to {layers[-1]}", disable=None, leave=False)):
        fitted = (~text.held_out[window]).nonzero().flatten()
        if last:
            fitted = fitted[step % min(STRIDE, len(fitted)) :: STRIDE]
        optimizer.zero_grad()
        with torch.enable_grad():
            one, seen = slice(window, window + 1), fitted.to(runner.device)
            hidden, wanted = fetch(inputs, one, runner.device), fetch(targets, one, runner.device)[0, seen]
            with half:
                for index in layers:
                    hidden = runner.differentiable_layer(index, hidden)
            hidden = hidden[0, seen]
            if last:
                hidden.backward(runner.head.teaching_gradient(hidden, wanted, labels[window, fitted], text.labels))
            else:
                _log_distances(hidden, wanted).mean().backward()
        optimizer.step()
        schedule.step()


def _last(runner: LayerRunner, layers: range) -> bool:
    return layers.stop == runner.num_layers


def _log_distances(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logarithm of each token's squared distance to its target, relative to that: the next norm divides by its length.

    Of the logarithm, because a few tokens stay far from their targets whatever the weights are, and would outweigh the rest.
    """
    targets = targets.float()
    scale = targets.square().mean(-1).clamp_min(1e-20)  # a stream of zeros; its inverse must not overflow
    return (FLOOR + (hidden.float() - targets).square().mean(-1) / scale).log()


def _distance(runner: LayerRunner, layers: range, hidden: torch.Tensor, targets: torch.Tensor, text: Text) -> float:
    """How far `hidden`, after `layers`, is from `targets` on the tokens held out: the mean of `_log_distances`, batch by batch.
    After the last layer it is what these learn by, of every `STRIDE`th token."""
    held_out = text.held_out
    if _last(runner, layers):
        return _head_distance(runner, hidden.flatten(0, 1), targets.flatten(0, 1), text)
    total = 0.0
    for batch in runner.batches(*held_out.shape):
        ours, theirs = (fetch(states, batch, runner.device) for states in (hidden, targets))
        total += float64(_log_distances(ours, theirs)[held_out[batch].to(runner.device)]).sum().item()
    return total / held_out.sum().item()


def _head_distance(runner: LayerRunner, hidden: torch.Tensor, targets: torch.Tensor, text: Text) -> float:
    """What the last layers learn by, of held-out tokens of `(tokens, hidden)`."""
    chosen = text.held_out.flatten().nonzero().flatten()[::STRIDE]
    seen = chosen.to(hidden.device)
    return runner.head.teaching_loss(hidden[seen], targets[seen], text.next_tokens.flatten()[chosen], text.labels)
