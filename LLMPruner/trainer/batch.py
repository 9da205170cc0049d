"""How many windows are computed at once, and whether activations are kept: what the memory at hand allows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from LLMPruner import parallel
from LLMPruner.files import read_json_file, write_json
from LLMPruner.memory import available_memory, out_of_memory
from LLMPruner.trainer.loss import Student
from LLMPruner.trainer.trained import trainable
from LLMPruner.training_config import FinetuneConfig

logger = logging.getLogger("LLMPruner")

USED = 0.7  # of the free memory: the rest is for what goes on during the way back
CPU_TOKENS = 512  # at once keep a CPU's cores busy: LoRA on SmolLM2 with 2,048 took 10% longer and twice the memory
KEPT_FILE = "batch.json"


@dataclass(frozen=True)
class Batch:
    """Windows computed at once, and whether activations are computed anew on the way back instead of kept."""

    windows: int
    recompute: bool


def choose_batch(student: Student, config: FinetuneConfig, windows: torch.Tensor, folder: Path) -> Batch:
    """The batch of a training on `windows` `(n, seq_len)`; that of the run which is continued where `folder` has one.

    The losses of a step are summed, so its windows may be computed at once or one by one: as many as fit on a GPU, on a
    CPU no more than make `CPU_TOKENS`. The memory of one window is measured once, by what its way forward keeps.
    """
    path = folder / KEPT_FILE
    if path.is_file():  # another batch would round differently
        return Batch(**read_json_file(path, "the batch of the interrupted training"))
    window = _kept_bytes(student, windows[:1])
    state = sum(12 * parameter.numel() for parameter in trainable(student).values())  # a gradient and Adam's two moments
    device = student.model.device
    room = parallel.least(int(USED * max(0, available_memory(str(device)) - state)))
    most = math.ceil(CPU_TOKENS / windows.shape[1]) if device.type == "cpu" else config.windows_per_step
    batch = _fitting(config, window, student.config.num_hidden_layers, room, most)
    logger.info(
        "batch: %d of a step's %d windows at once, %.2f GB of activations a window%s, %.1f GB free",
        batch.windows,
        config.windows_per_step,
        window / 1e9,
        " (computed anew on the way back)" if batch.recompute else "",
        room / USED / 1e9,
    )
    if parallel.main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(batch))
    return batch


def _fitting(config: FinetuneConfig, window: int, layers: int, room: int, most: int) -> Batch:
    """The most windows, `most` of them, that divide a step's; recomputing, when not even one window's activations fit, keeps
    about two layers' activations and the inputs of the others, a tenth of theirs."""
    step = config.windows_per_step
    sizes = [size for size in range(min(most, step), 0, -1) if step % size == 0]
    if config.micro_batch is not None:
        return Batch(config.micro_batch, recompute=config.micro_batch * window > room)
    fits = [size for size in sizes if size * window <= room]
    if fits:
        return Batch(fits[0], recompute=False)
    less = window * 2 // layers + window // 10
    return Batch(next((size for size in sizes if size * less <= room), 1), recompute=True)


def _kept_bytes(student: Student, windows: torch.Tensor) -> int:
    """Bytes that a batch's way forward keeps for the way back, weights not counted; where memory runs out, more than there
    are."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = student.model.device
    seeds = [device] if device.type == "cuda" else []
    student.train()
    try:
        _forward(student, windows, seeds, note)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return 2 * (sum(kept.values()) + available_memory(str(device)))  # more than there is, whatever it is
    return sum(kept.values())


def _forward(
    student: Student, windows: torch.Tensor, seeds: list[torch.device], note: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The way forward, of which `note` sees what is kept; no random number is used up."""
    device = student.model.device
    with (
        torch.random.fork_rng(seeds),
        torch.autocast(device.type, student.precision, enabled=student.precision is not None),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        student.model.get_decoder()(input_ids=windows.to(device), use_cache=False)
