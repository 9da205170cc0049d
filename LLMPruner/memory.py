"""The high-water mark of memory: of the CUDA device that a run computes on, else of the process."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

from LLMPruner import parallel

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def reset_peak_memory(device: str = "auto") -> None:
    """Start a new high-water mark of `device` (cpu, cuda, cuda:N, mps or auto) and of the process."""
    # Linux resets the process's high-water mark on request; elsewhere the peak is the process's so far.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    cuda = _cuda_name(device)
    if cuda is not None:
        sys.modules["torch"].cuda.reset_peak_memory_stats(cuda)


def peak_memory(device: str = "auto") -> int:
    """Bytes held at most since the last reset: of `device` where it is a CUDA one, else of the process."""
    cuda = _cuda_name(device)
    return process_peak_memory() if cuda is None else sys.modules["torch"].cuda.max_memory_allocated(cuda)


def available_memory(device: str) -> int:
    """Bytes that can still be taken: of `device` where it is a CUDA one, else of main memory (its share, where
    several processes of a run are on this machine) and of the process's limit."""
    cuda = _cuda_name(device)
    if cuda is not None:
        torch = sys.modules["torch"]  # what its allocator keeps for later is free, too
        kept = torch.cuda.memory_reserved(cuda) - torch.cuda.memory_allocated(cuda)
        return torch.cuda.mem_get_info(cuda)[0] + kept
    import psutil

    free = min(psutil.virtual_memory().available, *_left_to_groups()) // parallel.local()[1]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - psutil.Process().memory_info().vms)
    return max(0, free)


# Of a kind of control groups, by its name in /proc/self/cgroup (none: version 2): folder, limit, use, and how much of this is
# files that were read and can be dropped. Source: the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _left_to_groups(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left to each control group of Linux (of a container, of a batch job) that limits the process; `own` names them."""
    found = []
    with contextlib.suppress(OSError):  # another system
        for _, kind, place in (line.split(":", 2) for line in own.read_text().splitlines()):
            if kind in GROUPS:
                top = root / GROUPS[kind][0]
                folder = top / place.strip("/")  # in a container it may be the machine's name of it: then only `top` is there
                while folder.is_relative_to(top):
                    found += _left_to_group(folder, *GROUPS[kind][1:])
                    folder = folder.parent
    return found


def _left_to_group(folder: Path, limit: str, usage: str, inactive: str) -> list[int]:
    with contextlib.suppress(OSError, ValueError):  # not there, or "max"
        free = int((folder / limit).read_text()) - int((folder / usage).read_text())
        files = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        return [free + sum(int(size) for name, size in files if name == inactive)]
    return []


def return_freed_memory() -> None:
    """Give the system back what was freed: glibc keeps pages between blocks in use."""
    _call_glibc("malloc_trim", 0)


def free_large_blocks_at_once() -> None:
    """From now on the system gets every block of a MiB or more back as soon as it is freed, and the process holds what it uses.

    Otherwise glibc takes such blocks from its heap, where those still in use pin what was freed between them: more with every
    layer, and another amount in every run. The price is the system's work for each block anew.
    """
    _call_glibc("mallopt", M_MMAP_THRESHOLD, 1 << 20)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function that glibc alone has; with another C library nothing happens."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of the device or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED", "Cannot allocate memory")
    return isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)


def _cuda_name(device: str) -> str | None:
    """`device` as torch calls it where it is a CUDA one; None where it is not, or nobody has imported torch yet."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not device.startswith(("auto", "cuda")):
        return None
    return "cuda" if device == "auto" else device


def process_peak_memory() -> int:
    """Bytes of main memory that the process held at most since the last reset."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # POSIX only, and only where /proc did not answer

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
