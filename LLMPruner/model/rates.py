"""What this machine does in a second, measured in a third of one: products, copies, and reads of the model's own files."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner.cost import Rates

if TYPE_CHECKING:
    import torch

READ, WRITE = 1e9, 0.5e9  # bytes a second of a disk that nobody measured: a common SSD's, and as torch.save writes
PROBE = 16 << 20  # bytes of a weights file whose reading is timed
MOST = 0.06  # seconds a measurement, after a first try that does not count
CALL = {"cpu": 2e-5, "cuda": 8e-6}  # seconds a call of a small kernel from Python takes


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, file: Path | None = None) -> Rates:
    """The rates of `device` for a model of that `dtype` and hidden size; the disk's from `file`, where one is given."""
    import torch

    cpu = device.type == "cpu"
    size = min(width, 1024 if cpu else 4096)
    matmul = _products(device, dtype, size, 512 if cpu else 4096)
    single = matmul if dtype == torch.float32 else _products(device, torch.float32, size, 256 if cpu else 2048)
    wide = torch.device("cpu") if device.type == "mps" else device
    double = _products(wide, torch.float64, min(size, 512 if wide.type == "cpu" else 2048), 256)
    short = {torch.bfloat16: matmul if cpu else matmul / 2}  # float32 sums by units for short formats: methods/moments.py
    host = _copies(torch.device("cpu"), torch.device("cpu"), 16 << 20)
    return Rates(
        matmul=matmul,
        back=matmul if cpu else matmul / 2,  # kernels that give the same sums every time
        product=short.get(dtype, single),
        single=single,
        double=double,
        copy=host if cpu else _copies(device, device, 256 << 20),
        to_device=host if cpu else _copies(torch.device("cpu"), device, 64 << 20) / 2,
        read=READ if file is None else _reads(file),
        write=WRITE,
        call=CALL.get(device.type, 1e-5),
    )


@lru_cache(maxsize=16)
def _products(device: torch.device, dtype: torch.dtype, size: int, rows: int) -> float:
    """FLOPs a second of products `(rows, size) x (size, size)`."""
    import torch

    left, right = (torch.ones(count, size, dtype=dtype, device=device) for count in (rows, size))
    return 2 * rows * size * size / _seconds(lambda: left @ right, device)


@lru_cache(maxsize=4)
def _copies(source: torch.device, target: torch.device, size: int) -> float:
    """Bytes a second that a copy reads and writes."""
    import torch

    pinned = source.type == "cpu" and target.type == "cuda"
    values = torch.zeros(size, dtype=torch.uint8, device=source, pin_memory=pinned)
    room = torch.zeros(size, dtype=torch.uint8, device=target)
    return 2 * size / _seconds(lambda: room.copy_(values, non_blocking=True), target)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the mean of as many as take `MOST`."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < MOST:
        for _ in range(1 if device.type == "cpu" else 10):
            call()
            count += 1
        wait()
    return (time.perf_counter() - start) / count


def _reads(file: Path) -> float:
    """Bytes a second of reading the middle of a file, as it lies: on disk, or in the system's memory already."""
    size = min(PROBE, file.stat().st_size)
    with open(file, "rb", buffering=0) as handle:
        handle.seek((file.stat().st_size - size) // 2)
        start = time.perf_counter()
        read = len(handle.read(size))
    return max(read, 1) / max(time.perf_counter() - start, 1e-6)
