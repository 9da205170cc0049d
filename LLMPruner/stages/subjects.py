"""Whose figures an evaluation's are, and where and how they were measured."""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import LLMPruner
from LLMPruner.config import CommonConfig
from LLMPruner.evaluator.results import Subject, described
from LLMPruner.model.source import SMALL_FILES, ModelSource, weight_files
from LLMPruner.run import versions


def subject_of(name: str, source: ModelSource) -> Subject:
    """The model with a hash of all its files: of the weights samples and when they were written, of the others everything."""
    digest = hashlib.sha256(source.fingerprint().encode())
    for path in weight_files(source):
        digest.update(str(path.stat().st_mtime_ns).encode())
    if source.kind == "hf":
        for path in sorted({path for pattern in SMALL_FILES for path in source.path.glob(pattern)}):
            digest.update(path.name.encode() + path.read_bytes())
    return Subject(name, os.fspath(source.path), source.plan.total_params, digest.hexdigest()[:32])


def provenance(common: CommonConfig, command: str) -> dict[str, Any]:
    """Where and how this run measures."""
    import torch

    from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype

    device = resolve_device(common.device)
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return described(
        command=command,
        seed=common.seed,
        device=device.type,
        hardware=hardware,
        dtype=dtype_name(resolve_dtype(common.dtype, device)),
        versions={"LLMPruner": LLMPruner.__version__, **versions()},
    )
