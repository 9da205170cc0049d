"""The loss of a batch: cross-entropy on the text and divergence from the teacher, the logits a few tokens at a time.

A vocabulary of 128 thousand makes the logits of one batch larger than the model. So the head's product, the loss and its
gradient are computed chunk by chunk on the way forward, and no logits are left for the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from LLMPruner.data.windows import IGNORED
from LLMPruner.model.head import chunk_tokens
from LLMPruner.training_config import DistillConfig

Loss = Callable[..., torch.Tensor]


class Student(torch.nn.Module):
    """A causal language model as the loss of a batch, which is all that a trainer needs of it."""

    def __init__(self, model: Any, distill: DistillConfig, teacher: Any = None, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.distill = model, distill
        self.precision = precision  # what products are computed in, where that is not the weights' own
        self.beside = (teacher,)  # in a tuple: no part of what is trained, moved or split over devices
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **drawn: torch.Tensor) -> torch.Tensor:
        """The summed losses of a batch `(n, seq_len)`, float32 `(3,)`: what is trained on, cross-entropy, divergence.

        `labels[:, t]` is the token after `t`, or IGNORED. The teacher's answers are `drawn` (trainer/teacher.py), or made here
        where it stands beside. Only the first sum has a gradient.
        """
        rows, head = self._last(self.model, input_ids), self.model.get_output_embeddings().weight
        labels, extra = labels.flatten(), ()
        if drawn:
            extra = (drawn["tokens"].flatten(0, 1), drawn["entropy"].flatten())
        elif self.beside[0] is not None:
            with torch.no_grad():
                extra = (self._last(self.beside[0], input_ids),)
        loss = _Sums(self.distill, None if drawn or not extra else self.beside[0].get_output_embeddings().weight)
        return _Chunked.apply(loss, torch.is_grad_enabled(), rows, head, labels, *extra)

    @staticmethod
    def _last(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Normed last hidden states, `(tokens, hidden)`."""
        return model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)


class _Sums:
    """Summed losses of a chunk of tokens from their logits: trained on, cross-entropy, divergence."""

    def __init__(self, distill: DistillConfig, teacher_head: torch.Tensor | None) -> None:
        self.alpha, self.temperature, self.teacher_head = distill.distill_alpha, distill.distill_temperature, teacher_head

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        """`logits` `(tokens, vocabulary)` float32; `extra`: nothing, the teacher's last hidden states, or its drawn answers."""
        entropy = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        if not extra:
            return torch.stack([entropy, entropy.detach(), torch.zeros_like(entropy)])
        ours = functional.log_softmax(logits / self.temperature, -1)
        each = self._drawn(ours, *extra) if self.teacher_head is None else self._divergence(ours, *extra)
        divergence = torch.where(labels == IGNORED, 0.0, each).sum()
        # The square keeps the gradient's size whatever the temperature (Hinton et al. 2015, section 2.1).
        total = (1 - self.alpha) * entropy + self.alpha * self.temperature**2 * divergence
        return torch.stack([total, entropy.detach(), divergence.detach()])

    def _divergence(self, ours: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) of each token."""
        with torch.no_grad():
            logits = functional.linear(rows.to(self.teacher_head.dtype), self.teacher_head).float()
            theirs = functional.log_softmax(logits / self.temperature, -1)
        return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)

    @staticmethod
    def _drawn(ours: torch.Tensor, tokens: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """The same, estimated from tokens that the teacher drew `(tokens, draws)`: the mean over draws is unbiased, of the
        gradient too (Anshumann et al. 2025, arXiv 2503.16870)."""
        return -ours.gather(-1, tokens.long()).mean(-1) - entropy


class _Chunked(torch.autograd.Function):
    """loss(rows @ head.T, labels, ...) summed over chunks of tokens; the gradients are made on the way forward."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, learns: bool, rows: torch.Tensor, head: torch.Tensor, *targets: torch.Tensor) -> Any:
        """`rows` `(tokens, hidden)`, `head` `(vocabulary, hidden)`; `targets`: `(tokens, ...)` each."""
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.dtype
        compute = head.to(dtype)
        of_rows = torch.empty_like(rows) if learns and ctx.needs_input_grad[2] else None
        of_head = torch.zeros_like(head) if learns and ctx.needs_input_grad[3] else None
        size, sums = chunk_tokens(rows.device, len(head)), 0
        with torch.autocast(kind, enabled=False):
            for place in range(0, len(rows), size):
                part = slice(place, place + size)
                inputs = rows[part].to(dtype)
                logits = functional.linear(inputs, compute).float().requires_grad_(of_rows is not None)
                with torch.set_grad_enabled(of_rows is not None):
                    found = loss(logits, *(values[part] for values in targets))
                    trained = found[0]
                sums = sums + found.detach()
                if of_rows is not None:
                    gradient = torch.autograd.grad(trained, logits)[0].to(dtype)
                    of_rows[part] = (gradient @ compute).to(rows.dtype)
                    if of_head is not None:
                        _add_product(of_head, gradient, inputs)
        ctx.gradients = of_rows, of_head
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Scaled by what is done to the first sum; the others are for reading only."""
        scaled = [None if part is None else part.mul_(gradient[0]) for part in ctx.gradients]
        ctx.gradients = None
        return None, None, *scaled, *(None,) * (len(ctx.needs_input_grad) - 4)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add the chunk's gradient with respect to the head, in the precision of `total`."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, inputs)
    else:
        total += gradient.T @ inputs
