"""Whether a model fits the memory there is, and how it is streamed where it does not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from LLMPruner import parallel
from LLMPruner.config import CommonConfig
from LLMPruner.cost import BATCH_TOKENS, Setup
from LLMPruner.memory import available_memory
from LLMPruner.model.device import resolve_device, resolve_dtype
from LLMPruner.model.source import ModelSource

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Streaming:
    """Where a streamed model keeps what it changes, and how many bytes of hidden states stay in memory."""

    folder: Path
    limit: int


def streaming(source: ModelSource, common: CommonConfig, folder: Path) -> Streaming | None:
    """How the weights of a model that is only looked at stay on disk, as `--stream` says; None where they are loaded.

    `auto` streams where the weights and a batch's activations exceed the free memory of the device. Of a pruning run the
    forecast decides (stages/forecast.py).
    """
    if common.stream == "off":
        return None
    device = resolve_device(common.device)
    if common.stream == "auto":
        size = resolve_dtype(common.dtype, device).itemsize
        setup = Setup(source.geometry, size, cpu=device.type == "cpu")
        needed = source.plan.total_params * size + max(setup.activations(BATCH_TOKENS), setup.logits(BATCH_TOKENS))
        free = parallel.least(available_memory(str(device)))  # all processes decide alike, before one fills what they share
        if needed <= free:
            return None
        logger.info("the model needs %.1f GB of %s memory, %.1f GB are free: it is streamed", needed / 1e9, device, free / 1e9)
    return Streaming(folder, hidden_limit(common, available_memory("cpu")))


def hidden_limit(common: CommonConfig, free: int) -> int:
    """Bytes of hidden states that a streamed model keeps in main memory, of which `free` bytes are free."""
    return free // 2 if common.hidden_gb is None else int(common.hidden_gb * 1e9)
