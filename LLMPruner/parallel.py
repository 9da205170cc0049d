"""Several processes of one run, as `accelerate launch` or `torchrun` starts them: the windows are split over them.

Every process does the same to its share of the windows, and what they found is put together: sums are added, what belongs to
windows is strung together in their order, decisions are the first process's, and it alone writes. The launcher says by its
environment variables who is who, on one machine or many. In a run of one process everything here is the identity, and
torch.distributed is not imported.

torch.distributed itself, not accelerate's PartialState, which on GPUs knows NCCL alone: losses and sums over units lie in main
memory and go through gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from LLMPruner.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(hours=2)  # the others wait while the first process writes; that one has died the launcher sees at once
Value = TypeVar("Value")


def count() -> int:
    """Processes of the run, on all machines; one where no launcher has set both numbers."""
    return _number("WORLD_SIZE", 1) if os.environ.get("RANK", "").isdecimal() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def main() -> bool:
    """Whether this is the first process, which alone writes and reports."""
    return rank() == 0


def local() -> tuple[int, int]:
    """Which of the processes of its machine this is, from 0, and how many these are."""
    return (_number("LOCAL_RANK", rank()), _number("LOCAL_WORLD_SIZE", count())) if count() > 1 else (0, 1)


def quiet() -> bool | None:
    """For tqdm's `disable`: only the first process shows its progress, and only on a terminal."""
    return None if main() else True


def share(total: int) -> slice:
    """Which of `total` windows are this process's: adjacent ones, so that those of all processes in turn are in order."""
    return slice(total * rank() // count(), total * (rank() + 1) // count())


def mine(windows: torch.Tensor) -> torch.Tensor:
    """This process's share of `windows` `(n, ...)`."""
    return windows[share(len(windows))]


def check_shares(*windows: torch.Tensor | None) -> None:
    """Raise UsageError where a process would have no window."""
    for rows in windows:
        if rows is not None and len(rows) < count():
            raise UsageError(f"{count()} processes cannot share {len(rows)} windows: start fewer, or use more windows")


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors, in the place of this one where it is contiguous; the same bits in all of them."""
    if count() == 1:
        return tensor
    tensor = tensor.contiguous()
    with _together() as distributed:
        distributed.all_reduce(tensor)
    return tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The processes' tensors `(n, ...)`, n differing, one after the other."""
    if count() == 1:
        return tensor
    import torch

    with _together() as distributed:
        lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(count())]
        distributed.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        longest = tensor.new_zeros(max(map(int, lengths)), *tensor.shape[1:])  # all have to send the same size
        longest[: len(tensor)] = tensor
        parts = [torch.empty_like(longest) for _ in lengths]
        distributed.all_gather([_raw(part) for part in parts], _raw(longest))
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def from_main(value: Value) -> Value:
    """The first process's value, for all; a contiguous tensor is overwritten by it."""
    if count() == 1:
        return value
    import torch

    with _together() as distributed:
        if isinstance(value, torch.Tensor):
            value = value.contiguous()
            distributed.broadcast(_raw(value), src=0)
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]


def least(number: int) -> int:
    """The smallest of the processes' numbers."""
    if count() == 1:
        return number
    import torch

    return int(gathered(torch.tensor([number])).min())


def wait() -> None:
    """Go on when all processes have come here."""
    least(0)


def started() -> bool:
    """Whether the processes have found each other."""
    return count() > 1 and _distributed().is_initialized()


def leave() -> None:
    """The processes part, all of them done."""
    if started():
        _distributed().destroy_process_group()


@contextmanager
def _together() -> Iterator[Any]:
    """torch.distributed, with the processes connected. Raises RunError where another one is gone."""
    import torch

    distributed = _distributed()
    try:
        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)
        yield distributed
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise RunError(f"another process of this run does not answer any more ({one_line(error)[:120]})") from error


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: gloo does not know every dtype."""
    import torch

    return tensor.flatten().view(torch.uint8)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
