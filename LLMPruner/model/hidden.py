"""Hidden states of token windows, `(n, seq_len, hidden)`: where they lie, and how they go through a computation in batches.

They may lie on another device than the one that computes, or in files: each batch is fetched from where they are, and what is
computed is put where they were. Nobody else moves them.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from LLMPruner.cost import BATCH_TOKENS
from LLMPruner.errors import RunError
from LLMPruner.plan import Geometry


class Home:
    """Where hidden states lie between layers: on a device, and beyond `limit` bytes of them in files of `folder`.

    A file has no name any more once it is open, so that nothing is left of it whatever happens to the process.
    """

    def __init__(
        self, device: torch.device, *, pinned: bool = False, limit: int | None = None, folder: Path | None = None
    ) -> None:
        self.device, self.pinned, self.limit, self.folder = device, pinned, limit, folder
        self.held = 0  # bytes in memory

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room for hidden states. Raises RunError where the disk has none."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self.limit is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        taken = 1 << (size - 1).bit_length() if self.pinned else size  # as torch takes pinned memory
        if self.held + taken > self.limit:
            return _in_file(shape, dtype, size, self.folder)
        room = torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.pinned)
        self.held += taken
        weakref.finalize(room.untyped_storage(), self._release, taken)
        return room

    def empty_like(self, hidden: torch.Tensor) -> torch.Tensor:
        """Room for as many more."""
        return self.empty(hidden.shape, hidden.dtype)

    def _release(self, size: int) -> None:
        self.held -= size


def _in_file(shape: Sequence[int], dtype: torch.dtype, size: int, folder: Path | None) -> torch.Tensor:
    handle, name = tempfile.mkstemp(prefix="hidden.", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process when a page is written
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
        return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise RunError(
            f"{Path(name).parent} has no room for {size / 1e9:.1f} GB of hidden states ({error.strerror}): free some space, "
            "use fewer or shorter windows, or raise --hidden_gb"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()


def batches(count: int, seq_len: int, batch_tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Slices over `count` windows of about `batch_tokens` tokens each."""
    size = max(1, batch_tokens // seq_len)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def fetch(hidden: torch.Tensor, part: slice, device: torch.device) -> torch.Tensor:
    """A batch of `hidden` on the device that computes."""
    return hidden[part].to(device, non_blocking=device.type == "cuda")  # whose copies keep the order of the stream


def affordable(geometry: Geometry, dtype: torch.dtype, free: int) -> int:
    """Tokens that may go through a layer together where `free` bytes are left: BATCH_TOKENS, or half as often as needed.

    A token takes its channels five times (gate, up, their product, a copy in float32 and what is kept of it) and as many query
    columns, and a gradient as much again; half of what is free is for statistics.
    """
    width = geometry.intermediate_size + geometry.num_heads * geometry.head_dim + 2 * geometry.hidden_size
    token, tokens = 10 * width * max(dtype.itemsize, 2), BATCH_TOKENS
    while tokens > 1 and tokens * token > free // 2:
        tokens //= 2
    return tokens
