"""The layer-streamed runner: hidden states go through one decoder layer at a time.

Layer importance, gate gradients, statistics, repair and perplexity all run on this, so nobody else needs to know where a
layer's weights live, and no prefix is computed twice. Hidden states are `(n, seq_len, hidden)` in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from LLMPruner.removed import RemovedAttention, RemovedMLP

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BATCH_TOKENS = 4096  # tokens that go through a layer together
# float32 logits of one block, whatever the vocabulary (a divergence holds a few such blocks): 256 MB, but 16 MB on CPUs,
# where larger blocks are mapped and cleared anew every time, which doubles the time
LOGIT_ELEMENTS, LOGIT_ELEMENTS_CPU = 1 << 26, 1 << 22

Observer = Callable[[torch.Tensor], None]


class LayerRunner:
    """Runs `model` layer by layer. Attention is causal over whole, unpadded windows."""

    def __init__(self, model: LlamaForCausalLM, *, batch_tokens: int = BATCH_TOKENS) -> None:
        if model.config._attn_implementation not in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation("sdpa")  # eager attention is causal only when it is given a mask
        self.model = model
        self.batch_tokens = batch_tokens
        self._rope: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.model.model.layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.model.embed_tokens.weight.device

    def decoder_layer(self, index: int) -> nn.Module:
        """Layer `index`, with its weights in place. The one spot that knows where layers live."""
        return self.model.model.layers[index]

    def batches(self, count: int, seq_len: int) -> Iterator[slice]:
        """Slices over `count` windows of about `batch_tokens` tokens each."""
        size = max(1, self.batch_tokens // seq_len)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Token windows `(n, seq_len)` to the hidden states before layer 0."""
        return self.model.model.embed_tokens(windows.to(self.device))

    @torch.no_grad()
    def attention(self, index: int, hidden: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
        """Hidden states after the attention of layer `index`; `observe` sees each batch of o_proj's inputs."""
        layer = self.decoder_layer(index)
        if isinstance(layer.self_attn, RemovedAttention):
            return hidden
        return self._map(hidden, lambda batch: self._attention(layer, batch), layer.self_attn.o_proj, observe)

    @torch.no_grad()
    def mlp(self, index: int, hidden: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
        """Hidden states after the MLP of layer `index`; `observe` sees each batch of down_proj's inputs."""
        layer = self.decoder_layer(index)
        if isinstance(layer.mlp, RemovedMLP):
            return hidden
        return self._map(hidden, lambda batch: _mlp(layer, batch), layer.mlp.down_proj, observe)

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after layer `index`."""
        return self.mlp(index, self.attention(index, hidden))

    def differentiable_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after layer `index`, all windows at once, and for autograd to follow."""
        layer = self.decoder_layer(index)
        return _mlp(layer, self._attention(layer, hidden))

    def layers(self, hidden: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Hidden states after the layers `start` to `stop` (exclusive; None: the last)."""
        for index in range(start, self.num_layers if stop is None else stop):
            hidden = self.layer(index, hidden)
        return hidden

    @torch.no_grad()
    def losses(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Summed next-token negative log-likelihood of each window, float64 `(n,)`, from the last hidden states."""
        totals = []
        for batch in self.batches(*windows.shape):
            inputs = self.model.model.norm(hidden[batch, :-1])
            targets = windows[batch, 1:].to(inputs.device)
            nll = torch.cat([self._nll(rows, wanted) for rows, wanted in self._chunks(inputs.flatten(0, 1), targets.flatten())])
            totals.append(nll.view(targets.shape).sum(1, dtype=torch.float64).cpu())
        return torch.cat(totals)

    @torch.no_grad()
    def divergence(self, hidden: torch.Tensor, reference: torch.Tensor) -> float:
        """Mean KL(reference || model), nats a token, from the last hidden states of both.

        Both go through this model's head, which no pruning changes; log-probabilities of a few tokens are alive at a time.
        """
        chunks = self._chunks(hidden.flatten(0, -2), reference.flatten(0, -2))
        return sum(self._summed_divergence(*chunk).double().item() for chunk in chunks) / hidden.shape[:-1].numel()

    def divergence_gradient(self, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The gradient of `divergence` with respect to `hidden` `(tokens, hidden)`."""
        return self._head_gradient(self._chunks(hidden, reference), self._summed_divergence) / len(hidden)

    def gate_gradients(self, windows: torch.Tensor, visit: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        """Gradients of the summed loss with respect to gates of one on every o_proj and down_proj input, per token.

        Calls `visit(layer, attention, mlp)` for each batch and layer, from the last to the first, with float32 gradients
        `(batch, seq_len, query columns)` and `(batch, seq_len, channels)`. The gradient of a gate is its input times the
        input's gradient; no weight gradient is ever formed. Memory: one layer's activations, and one hidden state a layer.
        """
        self.model.requires_grad_(False)
        for batch in self.batches(*windows.shape):
            hidden = [self.embed(windows[batch])]
            for index in range(self.num_layers):
                hidden.append(self.layer(index, hidden[-1]))
            gradient = self._loss_gradient(hidden.pop(), windows[batch])
            for index in reversed(range(self.num_layers)):
                inputs = hidden.pop().detach().requires_grad_()
                layer = self.decoder_layer(index)
                with torch.enable_grad(), _capture(layer.self_attn.o_proj) as heads, _capture(layer.mlp.down_proj) as channels:
                    output = self.differentiable_layer(index, inputs)
                    wanted = (inputs, heads[0], channels[0])
                    gradient, heads_gradient, channels_gradient = torch.autograd.grad(output, wanted, gradient)
                with torch.no_grad():
                    visit(index, heads[0].float() * heads_gradient.float(), channels[0].float() * channels_gradient.float())

    def _loss_gradient(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """d(summed loss)/d(last hidden states), the logits in chunks."""
        result = torch.zeros_like(hidden)
        targets = windows[:, 1:].to(hidden.device).flatten()
        chunks = self._chunks(hidden[:, :-1].flatten(0, 1), targets)
        gradient = self._head_gradient(chunks, lambda rows, wanted: self._nll(self.model.model.norm(rows), wanted).sum())
        result[:, :-1] = gradient.view(hidden[:, :-1].shape)
        return result

    def _head_gradient(
        self,
        chunks: Iterator[tuple[torch.Tensor, torch.Tensor]],
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """d(summed loss)/d(rows) of chunks of rows and what they should give."""
        gradients = []
        for rows, wanted in chunks:
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                gradients.append(torch.autograd.grad(loss(rows, wanted), rows)[0])
        return torch.cat(gradients)

    def _summed_divergence(self, rows: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Summed KL(reference || model) of last hidden states `(tokens, hidden)`."""
        with torch.no_grad():
            theirs = self._log_probs(reference)
        return functional.kl_div(self._log_probs(rows), theirs, reduction="sum", log_target=True)

    def _nll(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.model.lm_head(rows).float(), targets, reduction="none")

    def _log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities, float32, from the last hidden states, which may be wider than the model."""
        rows = rows.to(self.model.lm_head.weight.dtype)
        return self.model.lm_head(self.model.model.norm(rows)).float().log_softmax(-1)

    def _chunks(self, rows: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        elements = LOGIT_ELEMENTS_CPU if self.device.type == "cpu" else LOGIT_ELEMENTS
        size = max(1, elements // self.model.config.vocab_size)
        return zip(rows.split(size), targets.split(size), strict=True)

    def _map(
        self,
        hidden: torch.Tensor,
        step: Callable[[torch.Tensor], torch.Tensor],
        projection: nn.Linear,
        observe: Observer | None,
    ) -> torch.Tensor:
        output = torch.empty_like(hidden)
        for batch in self.batches(*hidden.shape[:2]):
            if observe is None:
                output[batch] = step(hidden[batch])
            else:
                with _capture(projection) as inputs:
                    output[batch] = step(hidden[batch])
                observe(inputs[0].flatten(0, -2))
        return output

    def _attention(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        normed = layer.input_layernorm(hidden)
        output, _ = layer.self_attn(
            hidden_states=normed, position_embeddings=self._rotary(hidden), attention_mask=None, is_causal=True
        )
        return hidden + output

    def _rotary(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seq_len = hidden.shape[1]
        if seq_len not in self._rope:
            positions = torch.arange(seq_len, device=hidden.device).unsqueeze(0)
            with torch.no_grad():
                self._rope[seq_len] = self.model.model.rotary_emb(hidden, position_ids=positions)
        return self._rope[seq_len]


def _mlp(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@contextmanager
def _capture(projection: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of `projection` while the context is open."""
    inputs: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()
