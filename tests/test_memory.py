"""The high-water mark of memory: of the device that a run computes on, and of nobody else's."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from LLMPruner import memory
from LLMPruner.memory import peak_memory, process_peak_memory, reset_peak_memory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """A machine with CUDA devices; what they are asked, in order. Each says that 7 bytes were held."""
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append(("peak", device)) or 7)
    return calls


@pytest.mark.parametrize(("device", "name"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")])
def test_the_device_that_computes_is_asked(asked, device, name):
    reset_peak_memory(device)
    assert peak_memory(device) == 7 and asked == [("reset", name), ("peak", name)]


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_another_device_means_the_process_also_beside_a_gpu(asked, device):
    reset_peak_memory(device)
    assert peak_memory(device) > 2**20 and not asked


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_without_a_gpu_or_torch_it_is_the_process(asked, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory(device) > 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(sys.modules, "torch")
    reset_peak_memory(device)
    assert peak_memory(device) > 2**20 and not asked and "torch" not in sys.modules


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux starts the mark again")
def test_a_reset_forgets_what_was_held_before():
    def held(size: int) -> int:
        reset_peak_memory("cpu")
        block = bytearray(size)
        block[::4096] = b"x" * len(block[::4096])
        del block
        return process_peak_memory()

    little, much, again = held(1 << 20), held(256 << 20), held(1 << 20)
    assert much - little > 200 << 20 and much - again > 200 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_or_batch_job_may_have_less_than_the_machine(tmp_path, monkeypatch, version) -> None:
    """Its group's limit and that of the group around it, without files that can be dropped; one has none."""
    own, top = tmp_path / "cgroup", tmp_path / "fs" / ("memory" if version == 1 else "")
    own.write_text("3:cpuset:/other\n" + ("4:memory:/job/step\n" if version == 1 else "0::/job/step\n"))
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    for place, limit, used in (("job/step", "8000", "3000"), ("job", "9000", "7000"), ("", "max", "9")):
        folder = top / place
        folder.mkdir(parents=True, exist_ok=True)
        values = (limit, used, f"active_file 5\n{names[2]} 500")
        for name, value in zip((*names[:2], "memory.stat"), values, strict=True):
            (folder / name).write_text(f"{value}\n")
    assert memory._left_to_groups(own, tmp_path / "fs") == [5500, 2500]
    own.write_text(own.read_text().replace("/job/step", "/docker/abc"))  # the machine's name of it: only the top is there
    assert memory._left_to_groups(own, tmp_path / "fs") == []
    (top / names[0]).write_text("1009\n")
    assert memory._left_to_groups(own, tmp_path / "fs") == [1500]
    monkeypatch.setattr(memory, "_left_to_groups", lambda: [12345])
    assert memory.available_memory("cpu") == 12345


GLIBC = pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="another allocator")
HOLES = """
import sys, torch
from pathlib import Path
from LLMPruner.memory import free_large_blocks_at_once, return_freed_memory

def own():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

if "at_once" in sys.argv:
    free_large_blocks_at_once()
torch.ones(2**22)  # freed at once: by itself glibc takes blocks up to this size from its heap from now on
blocks = [(torch.ones(2**18), torch.ones(2**8)) for _ in range(200)]
full = own()
kept = [small for _, small in blocks]
del blocks
held = own()
return_freed_memory()
print(full, held, own())
"""


def held_around_holes(*flags: str) -> tuple[int, int, int]:
    """Bytes that a process holds with large blocks between small ones, without them, and after `return_freed_memory`."""
    done = subprocess.run([sys.executable, "-c", HOLES, *flags], capture_output=True, text=True, check=True, cwd=ROOT)
    full, held, after = map(int, done.stdout.split())
    return full, held, after


@GLIBC
def test_freed_memory_is_returned() -> None:
    """Blocks that were freed between blocks in use are the system's again: else streamed layers would add up."""
    full, held, after = held_around_holes()
    assert full - held < 100e6, "glibc gave it back by itself: the test shows nothing"
    assert held - after > 150e6


@GLIBC
@pytest.mark.parametrize("at_once", [False, True])
def test_large_blocks_are_the_systems_again_when_they_are_freed(at_once: bool) -> None:
    """Without anyone asking for it, between blocks that stay in use."""
    full, held, _ = held_around_holes(*["at_once"] * at_once)
    assert (full - held > 150e6) == at_once
