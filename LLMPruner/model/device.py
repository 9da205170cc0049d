"""Where a model computes and in which precision. No torch until one of them is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises UsageError for a device this machine lacks."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if parallel.count() == 1:
            return torch.device(name)
    if parallel.count() > 1:
        name = _own_device(name)
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("meta tensors hold no data")
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError and others for one and the same thing
        raise UsageError(f"--device {name} is not available here: use cpu, cuda, cuda:N, mps or auto") from error
    return device


def _own_device(name: str) -> str:
    """The device of this process among those of its machine: a GPU each, which then is what `cuda` means everywhere."""
    import torch

    if name not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name} is for one process: several compute on a GPU each or on the CPU, use cuda, cpu or auto"
        )
    place, processes = parallel.local()
    if name == "cuda" and torch.cuda.device_count() < processes:
        raise UsageError(
            f"{processes} processes on a machine with {torch.cuda.device_count()} GPUs: start one for each, or use --device cpu"
        )
    if name == "cuda":
        torch.cuda.set_device(place)
        return f"cuda:{place}"
    return name


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it (GPUs from Ampere on, Apple's, CPUs with matrix units).

    Elsewhere it is float32: an older GPU or CPU emulates bfloat16, and AVX-512's bfloat16 products alone take twice the time of
    float32's (84 against 158 GFLOP/s on one core of a Xeon whose matrix units are hidden).
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported()
    else:
        fast = True
    return torch.bfloat16 if fast else torch.float32


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """The values in float64; on the CPU where their own device has no such numbers (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@contextmanager
def deterministic() -> Iterator[None]:
    """Only kernels that give the same sums every time: attention's backward on CUDA adds in whatever order threads finish.

    cuBLAS needs a workspace of its own for it, whose size `cli.py` sets before torch is imported.
    """
    import torch

    flags = torch.utils.deterministic
    strict, warns, fills = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        flags.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    # else all new memory is filled, which costs time and is for finding bugs
    flags.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        flags.fill_uninitialized_memory = fills


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
