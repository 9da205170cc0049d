"""Whose figures an evaluation's are, and where and how they were measured."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import LLMPruner
from LLMPruner.config import CommonConfig
from LLMPruner.evaluator.results import Subject, described
from LLMPruner.model.source import ModelSource, small_files, weight_files
from LLMPruner.run import versions


def subject_of(name: str, source: ModelSource) -> Subject:
    """The model with a hash of all files that it is read from: of the weights samples and when they were written, of the others
    everything."""
    digest = hashlib.sha256(source.fingerprint().encode())
    for path in weight_files(source):
        digest.update(str(path.stat().st_mtime_ns).encode())
    if source.kind == "hf":
        for path in small_files(source.path):
            digest.update(path.relative_to(source.path).as_posix().encode() + path.read_bytes())
    return Subject(name, os.fspath(source.path), source.plan.total_params, digest.hexdigest()[:32])


def provenance(common: CommonConfig, command: str) -> dict[str, Any]:
    """Where and how this run measures. `hardware` keys nothing but speed, and the host's name is not told."""
    import torch

    from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype

    device = resolve_device(common.device)
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return described(
        command=command,
        seed=common.seed,
        device=device.type,
        hardware=hardware,
        dtype=dtype_name(resolve_dtype(common.dtype, device)),
        versions={"LLMPruner": LLMPruner.__version__, **versions()},
    )


def machine(run: Mapping[str, Any]) -> str:
    """What speed depends on and nothing else does: the hardware of a run, and whose it is."""
    return f"{run['hardware']}, {platform.node()}"


def cpu_name() -> str:
    """The CPU's model, where Linux tells it; else what Python knows of it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
