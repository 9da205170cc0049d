"""Hidden states through one decoder layer at a time.

Layer importance, gate gradients, statistics, repair and perplexity all run on this, so nobody else needs to know where a
layer's weights live, and no prefix is computed twice. Hidden states are `(n, seq_len, hidden)` in the model's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from LLMPruner import parallel
from LLMPruner.families.family import Sublayer
from LLMPruner.families.slicing import is_removed, output_projection
from LLMPruner.memory import out_of_memory
from LLMPruner.model.device import deterministic
from LLMPruner.model.head import Head
from LLMPruner.model.hidden import BATCH_TOKENS, batches, fetch
from LLMPruner.model.store import ResidentStore, Store

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Observed:
    """A batch of hidden states `(n, seq_len, hidden)` after a sublayer, and what entered and left its output projection."""

    after: torch.Tensor
    inputs: torch.Tensor  # (n, seq_len, columns)
    outputs: torch.Tensor  # (n, seq_len, hidden), its bias included


Result = TypeVar("Result")
Observer = Callable[[torch.Tensor, Observed], None]  # sees a batch before the sublayer, and what became of it


class LayerRunner:
    """Runs the layers of a store over batches of windows."""

    def __init__(self, store: Store, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.store, self.table, self.home = store, store.table, store.home
        self.head = Head(store, batch_tokens=batch_tokens)

    @classmethod
    def of(cls, model: LlamaForCausalLM, *, batch_tokens: int = BATCH_TOKENS) -> LayerRunner:
        """A runner of a model that is in memory."""
        return cls(ResidentStore(model), batch_tokens=batch_tokens)

    @property
    def batch_tokens(self) -> int:
        """Tokens that go through a layer, or the head, together."""
        return self.head.batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, tokens: int) -> None:
        self.head.batch_tokens = tokens

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.store.num_layers

    @property
    def device(self) -> torch.device:
        """Where layers compute."""
        return self.store.device

    def batches(self, count: int, seq_len: int) -> Iterator[slice]:
        """Slices over `count` windows, as they go through a layer together."""
        return batches(count, seq_len, self.batch_tokens)

    def computed(self, count: int, seq_len: int, compute: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """`compute` of batch after batch of `count` windows, and which windows it was of; where memory runs out, of half as
        many from then on. What it gives is put together by the caller, so that nothing is counted twice."""
        start = 0
        while start < count:
            part = slice(start, min(count, start + max(1, self.batch_tokens // seq_len)))
            try:
                result = compute(part)
            except Exception as error:
                half = (part.stop - part.start) // 2
                if half == 0 or not out_of_memory(error):
                    raise
                self.batch_tokens = half * seq_len
                logger.warning("memory ran out: %d windows of %d tokens at a time from now on", half, seq_len)
                continue
            yield part, result
            del result  # before the next batch is computed
            start = part.stop

    def filled(self, room: torch.Tensor, compute: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """`room` `(n, seq_len, ...)` with what `compute` gives for each batch of windows in its place."""
        for part, rows in self.computed(*room.shape[:2], compute):
            room[part] = rows
            del rows
        return room

    def passes(self, count: int, seq_len: int) -> list[slice]:
        """Slices over this process's share of `count` windows that go through all layers together: those of a batch where the
        weights are at hand, all where they are read from disk, so that each layer is read once."""
        mine = parallel.share(count)
        parts = self.batches(mine.stop - mine.start, seq_len) if self.store.resident else [slice(0, mine.stop - mine.start)]
        return [slice(mine.start + part.start, mine.start + part.stop) for part in parts]

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Token windows `(n, seq_len)` to the hidden states before layer 0."""
        hidden = self.home.empty((*windows.shape, self.store.geometry.hidden_size), self.store.model.dtype)
        for part in self.batches(*windows.shape):
            hidden[part] = self.store.embed(windows[part])
        return hidden

    @torch.no_grad()
    def sublayer(self, index: int, sublayer: Sublayer, hidden: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
        """Hidden states after a sublayer of layer `index`; `observe` sees each batch of them go through."""
        with self.store.layer(index) as layer:
            if is_removed(getattr(layer, sublayer.attribute)):
                return hidden

            def step(part: slice) -> tuple[torch.Tensor, Observed | None]:
                batch = fetch(hidden, part, self.device)
                if observe is None:
                    return self._after(layer, sublayer, batch), None
                seen = self._observed(layer, sublayer, batch)
                return seen.after, seen

            output = self.home.empty_like(hidden)
            for part, (after, seen) in self.computed(*hidden.shape[:2], step):
                if observe is not None:
                    observe(fetch(hidden, part, self.device), seen)
                output[part] = after
                del after, seen
            return output

    @torch.no_grad()
    def observed(self, index: int, sublayer: Sublayer, batch: torch.Tensor) -> Observed:
        """One batch `(n, seq_len, hidden)` through a sublayer of layer `index`, and what its output projection did."""
        with self.store.layer(index) as layer:
            return self._observed(layer, sublayer, batch)

    @torch.no_grad()
    def entering(self, index: int, sublayer: Sublayer, batch: torch.Tensor) -> torch.Tensor:
        """What enters the output projection of a sublayer, `(n, seq_len, columns)`, of one batch; the product is left out."""
        with self.store.layer(index) as layer:
            projection = output_projection(layer, sublayer)
            with _capture(projection) as calls, _nothing_from(projection):
                self._after(layer, sublayer, batch)
            return calls[0][0]

    @torch.no_grad()
    def joined(
        self,
        index: int,
        sublayer: Sublayer,
        hidden: torch.Tensor,
        entering: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states after a sublayer of layer `index` whose output projection, of `weight` `(hidden, k)` and `bias`, takes
        `entering` `(n, seq_len, k)`: what comes before it is not computed again."""
        with self.store.layer(index) as layer:

            def step(part: slice) -> torch.Tensor:
                output = nn.functional.linear(fetch(entering, part, self.device), weight, bias)
                return _joined(layer, sublayer, fetch(hidden, part, self.device), output)

            return self.filled(self.home.empty_like(hidden), step)

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after layer `index`."""
        for sublayer in self.table.sublayers:
            hidden = self.sublayer(index, sublayer, hidden)
        return hidden

    def differentiable_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after layer `index`, all windows at once, and for autograd to follow."""
        with self.store.layer(index) as layer:
            for sublayer in self.table.sublayers:
                hidden = self._after(layer, sublayer, hidden)
        return hidden

    def layers(self, hidden: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Hidden states after the layers `start` to `stop` (exclusive; None: the last)."""
        for index in range(start, self.num_layers if stop is None else stop):
            hidden = self.layer(index, hidden)
        return hidden

    def prefixes(self, windows: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states before every layer, and after the last."""
        hidden = [self.embed(windows)]
        for index in range(self.num_layers):
            hidden.append(self.layer(index, hidden[-1]))
        return hidden

    def gate_gradients(self, windows: torch.Tensor, visit: Callable[[int, tuple[torch.Tensor, ...]], None]) -> None:
        """Gradients of the summed loss with respect to gates of one on every input of the output projections, per token.

        Calls `visit(layer, (attention, mlp))` for each batch and layer, from the last to the first, with float32 gradients
        `(batch, seq_len, query columns)` and `(batch, seq_len, channels)`. The gradient of a gate is its input times the
        input's gradient; no weight gradient is ever formed. One forward pass keeps the hidden states before every layer, one
        backward pass visits the layers in reverse. Memory: one layer's activations, and one hidden state a layer.
        """
        self.store.requires_grad_(False)
        for part in self.passes(*windows.shape):
            hidden, chosen = self.prefixes(windows[part]), windows[part]
            gradient = self._loss_gradient(hidden.pop(), chosen)
            for index in reversed(range(self.num_layers)):
                self._backward(index, hidden.pop(), gradient, visit)

    def _backward(
        self,
        index: int,
        inputs: torch.Tensor,
        gradient: torch.Tensor,
        visit: Callable[[int, tuple[torch.Tensor, ...]], None],
    ) -> None:
        """One layer of the backward pass: `gradient`, of the loss with respect to its outputs, becomes that of its `inputs`."""

        def step(part: slice) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            before = fetch(inputs, part, self.device).detach().requires_grad_()
            return self._gates(index, before, fetch(gradient, part, self.device))

        with self.store.layer(index):
            for part, (gates, arriving) in self.computed(*inputs.shape[:2], step):
                gradient[part] = arriving
                visit(index, gates)
                del gates, arriving

    def _loss_gradient(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """d(summed loss)/d(last hidden states), in the place of these."""
        for batch in self.batches(*windows.shape):
            hidden[batch] = self.head.loss_gradient(fetch(hidden, batch, self.device), windows[batch])
        return hidden

    def _gates(self, index: int, inputs: torch.Tensor, gradient: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The gates' gradients of one layer, and that of its inputs, from the one of its outputs."""
        with self.store.layer(index) as layer, torch.enable_grad(), deterministic():
            attention, mlp = (output_projection(layer, sublayer) for sublayer in self.table.sublayers)
            with _capture(attention) as heads, _capture(mlp) as channels:
                output = self.differentiable_layer(index, inputs)
            captured = (heads[0][0], channels[0][0])
            gradient, *slopes = torch.autograd.grad(output, (inputs, *captured), gradient)
        with torch.no_grad():
            gates = (value.float() * slope.float() for value, slope in zip(captured, slopes, strict=True))
            return tuple(gates), gradient

    def _observed(self, layer: nn.Module, sublayer: Sublayer, batch: torch.Tensor) -> Observed:
        with _capture(output_projection(layer, sublayer)) as calls:
            after = self._after(layer, sublayer, batch)
        return Observed(after, *calls[0])

    def _after(self, layer: nn.Module, sublayer: Sublayer, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream after one sublayer of a decoder layer."""
        module, normed = getattr(layer, sublayer.attribute), getattr(layer, sublayer.norm)(hidden)
        if sublayer.name == "attention":
            rotary = self.store.rotary(hidden)
            output, _ = module(hidden_states=normed, position_embeddings=rotary, attention_mask=None, is_causal=True)
        else:
            output = module(normed)
        return _joined(layer, sublayer, hidden, output)


def _joined(layer: nn.Module, sublayer: Sublayer, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The residual stream with a sublayer's output in it."""
    for norm in sublayer.wraps:
        output = getattr(layer, norm)(output)
    return hidden + output


@contextmanager
def _capture(projection: nn.Linear) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the inputs and outputs of `projection` while the context is open."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = projection.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _nothing_from(projection: nn.Linear) -> Iterator[None]:
    """`projection` gives zeros, without a product, while the context is open."""
    projection.forward = lambda inputs: inputs.new_zeros(()).expand(*inputs.shape[:-1], projection.out_features)
    try:
        yield
    finally:
        del projection.forward
