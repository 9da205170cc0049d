"""Hidden states of token windows, `(n, seq_len, hidden)`, and how they go through a computation: in batches of windows.

They may lie on another device than the one that computes: each batch is fetched from where they are, and what is computed
is put where they were. Nobody else moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

BATCH_TOKENS = 4096  # tokens that go through a layer together


def batches(count: int, seq_len: int, batch_tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices over `count` windows of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // seq_len)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def fetch(hidden: torch.Tensor, part: slice, device: torch.device) -> torch.Tensor:
    """A batch of `hidden` on the device that computes."""
    return hidden[part].to(device)


def mapped(
    hidden: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor], device: torch.device, batch_tokens: int
) -> torch.Tensor:
    """`step` of every batch of `hidden`, computed on `device`, in one tensor beside `hidden`."""
    output = torch.empty_like(hidden)
    for part in batches(*hidden.shape[:2], batch_tokens):
        output[part] = step(fetch(hidden, part, device))
    return output
