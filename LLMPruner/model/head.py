"""What hidden states say: next-token losses, KL divergence, and their gradients, the logits a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from LLMPruner.data.windows import IGNORED
from LLMPruner.model.device import deterministic, float64
from LLMPruner.model.hidden import BATCH_TOKENS, batches, fetch
from LLMPruner.model.store import Store

# float32 logits of one block, whatever the vocabulary (a divergence holds a few such blocks): 256 MB, but 16 MB on CPUs,
# where larger blocks are mapped and cleared anew every time, which doubles the time
LOGIT_ELEMENTS, LOGIT_ELEMENTS_CPU = 1 << 26, 1 << 22


def chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits are computed together."""
    return max(1, (LOGIT_ELEMENTS_CPU if device.type == "cpu" else LOGIT_ELEMENTS) // vocabulary)


Chunks = Iterator[tuple[torch.Tensor, ...]]


class Head:
    """The final norm and the language-model head, on last hidden states `(n, seq_len, hidden)`."""

    def __init__(self, store: Store, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.store, self.batch_tokens = store, batch_tokens

    @torch.no_grad()
    def losses(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Summed next-token negative log-likelihood of each window, float64 `(n,)`, from the last hidden states; of tokens that
        are IGNORED none."""
        totals = []
        for batch in batches(*windows.shape, self.batch_tokens):
            inputs = self.store.final_norm(fetch(hidden, batch, self.store.device)[:, :-1])
            targets = windows[batch, 1:].to(inputs.device)
            nll = torch.cat([self._nll(rows, wanted) for rows, wanted in self._chunks(inputs.flatten(0, 1), targets.flatten())])
            totals.append(float64(nll.view(targets.shape)).sum(1).cpu())
        return torch.cat(totals)

    @torch.no_grad()
    def divergence(self, hidden: torch.Tensor, reference: torch.Tensor, head: Head | None = None) -> float:
        """Mean KL(reference || model), nats a token, from the last hidden states of both.

        The reference goes through `head`; None: through this model's, which no pruning changes, but a fine-tuning may.
        Log-probabilities of a few tokens are alive at a time.
        """
        return self._mean_divergence(hidden, reference, (head or self)._log_probs)

    @torch.no_grad()
    def divergence_from(self, hidden: torch.Tensor, log_probs: torch.Tensor) -> float:
        """`divergence` from a reference whose `log_probs` `(n, seq_len, vocabulary)` are known."""
        return self._mean_divergence(hidden, log_probs, lambda rows: rows.to(self.store.device))

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities of all tokens of last hidden states, float32 `(n, seq_len, vocabulary)`."""
        rows = hidden.flatten(0, -2)
        found = torch.cat([self._log_probs(chunk) for (chunk,) in self._chunks(rows)])
        return found.view(*hidden.shape[:-1], -1)

    def _mean_divergence(
        self, hidden: torch.Tensor, reference: torch.Tensor, theirs: Callable[[torch.Tensor], torch.Tensor]
    ) -> float:
        """`theirs` gives the reference's log-probabilities."""
        total = 0.0
        for rows, wanted in self._chunks(hidden.flatten(0, -2), reference.flatten(0, -2)):
            total += functional.kl_div(self._log_probs(rows), theirs(wanted), reduction="sum", log_target=True).item()
        return total / hidden.shape[:-1].numel()

    @torch.no_grad()
    def teaching_loss(self, hidden: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, share: float) -> float:
        """What layers before the head learn by, mean nats a token: KL(reference || model) and, `share` of it, the negative
        log-likelihood of `labels` `(tokens,)`, next tokens. Where these are IGNORED, the divergence alone.

        `hidden` and `reference` are last hidden states `(tokens, hidden)`.
        """
        total = 0.0
        for rows, wanted, right in self._chunks(hidden, reference, labels[:, None]):
            ours, theirs, right = self._log_probs(rows), self._log_probs(wanted), right.to(self.store.device)
            own = _own(right, share)
            divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1, keepdim=True)
            total += ((1 - own) * divergence - own * ours.gather(1, right.clamp_min(0))).sum().item()
        return total / len(hidden)

    def teaching_gradient(
        self, hidden: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, share: float
    ) -> torch.Tensor:
        """The gradient of `teaching_loss` with respect to `hidden`.

        That with respect to the logits is the difference of two distributions: no logarithm is taken, or gone back through.
        """

        def answers(rows: torch.Tensor, wanted: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, right = self._logits(rows), right.to(self.store.device)
            with torch.no_grad():
                own = _own(right, share)
                theirs = self._logits(wanted).softmax(-1).mul_(1 - own).scatter_add_(1, right.clamp_min(0), own)
                return logits, logits.softmax(-1).sub_(theirs)

        return _gradient(self._chunks(hidden, reference, labels[:, None]), answers) / len(hidden)

    def loss_gradient(self, hidden: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """d(summed loss)/d(last hidden states)."""
        result = torch.zeros_like(hidden)
        targets = windows[:, 1:].to(hidden.device).flatten()
        chunks = self._chunks(hidden[:, :-1].flatten(0, 1), targets)
        gradient = _gradient(chunks, lambda rows, wanted: (self._nll(self.store.final_norm(rows), wanted).sum(), None))
        result[:, :-1] = gradient.view(hidden[:, :-1].shape)
        return result

    def _nll(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.store.head(rows).float(), targets, ignore_index=IGNORED, reduction="none")

    def _log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities, float32, from the last hidden states."""
        return self._logits(rows).log_softmax(-1)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits, float32, from the last hidden states, which may be wider than the model."""
        rows = rows.to(self.store.device, self.store.head.weight.dtype)
        return self.store.head(self.store.final_norm(rows)).float()

    def _chunks(self, *rows: torch.Tensor) -> Chunks:
        """Of all `rows` as many at a time as fit."""
        size = chunk_tokens(self.store.device, self.store.geometry.vocab_size)
        return zip(*(part.split(size) for part in rows), strict=True)


def _own(labels: torch.Tensor, share: float) -> torch.Tensor:
    """By how much each label counts, float32."""
    return share * (labels != IGNORED).float()


def _gradient(chunks: Chunks, answers: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    """d(sum)/d(rows) of chunks of rows and what they should give; `answers` gives what they do give, and the sum's gradient
    with respect to that, None where it is the sum."""
    gradients = []
    for rows, *wanted in chunks:
        rows = rows.detach().requires_grad_()
        with torch.enable_grad(), deterministic():
            given, slope = answers(rows, *wanted)
            gradients.append(torch.autograd.grad(given, rows, slope)[0])
    return torch.cat(gradients)
