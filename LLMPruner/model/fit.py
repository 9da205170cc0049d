"""Whether a model fits the memory there is, and how it is streamed where it does not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from LLMPruner.config import CommonConfig
from LLMPruner.memory import available_memory
from LLMPruner.model.device import resolve_device, resolve_dtype
from LLMPruner.model.source import ModelSource

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Streaming:
    """Where a streamed model keeps what it changes, and how many bytes of hidden states stay in memory."""

    folder: Path
    limit: int


def streaming(
    source: ModelSource, common: CommonConfig, folder: Path, *, beside: int = 0, able: bool = True
) -> Streaming | None:
    """How the weights of `source` stay on disk, as `--stream` says; None where they are loaded.

    `auto` streams what is `able` to where the weights and the `beside` bytes of what is computed from them exceed the free
    memory of the device.
    """
    if common.stream == "off" or (common.stream == "auto" and not able):
        return None
    device = resolve_device(common.device)
    if common.stream == "auto":
        needed = source.plan.total_params * resolve_dtype(common.dtype, device).itemsize + beside
        free = available_memory(str(device))
        if needed <= free:
            return None
        logger.info("the model needs %.1f GB of %s memory, %.1f GB are free: it is streamed", needed / 1e9, device, free / 1e9)
    limit = available_memory("cpu") // 2 if common.hidden_gb is None else int(common.hidden_gb * 1e9)
    return Streaming(folder, limit)
