"""Checkpoints of a training: what is trained, and the Trainer's own state, so that a run that died goes on as if it had not.

The Trainer writes a checkpoint file by file. One counts when it is marked as whole, which is done when all of it is on disk;
only then older ones go, first their marks. So whenever a run dies, the best and the last whole one are there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from LLMPruner import parallel
from LLMPruner.errors import RunError
from LLMPruner.files import write_text
from LLMPruner.trainer.trained import trainable

WEIGHTS_FILE, WHOLE = "trained.safetensors", "whole"
KEPT = 2  # the best one and the last one


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; what a death left half-written is removed."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    for path in found:
        if not (path / WHOLE).is_file() and parallel.main():
            shutil.rmtree(path)
    whole = [path for path in found if (path / WHOLE).is_file()]
    parallel.wait()  # until all have looked
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def _remove_old(folder: Path, best: str | None) -> None:
    """Remove all whole checkpoints but the best one and the last one, or the last two where these are one."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")]
    whole.sort(key=lambda path: (best is not None and path.name == Path(best).name, step_of(path)))
    for path in whole[:-KEPT]:
        (path / WHOLE).unlink()
        shutil.rmtree(path)


def write_weights(model: torch.nn.Module, folder: Path) -> None:
    """The parameters that are trained; of two names for one tensor the first."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in trainable(model).items()}, folder / WEIGHTS_FILE)


def read_weights(model: torch.nn.Module, folder: Path) -> None:
    """Put them back. Raises RunError where they are those of another model."""
    wanted, found = trainable(model), load_file(folder / WEIGHTS_FILE)
    if {name: value.shape for name, value in wanted.items()} != {name: value.shape for name, value in found.items()}:
        raise RunError(f"{folder} is the checkpoint of another model: run without --resume")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[name])


class MarkWhole(TrainerCallback):
    """Marks a checkpoint when all of its files are on the disk, and removes those that are no longer needed."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called when the Trainer has written its last file."""
        parallel.wait()  # each process writes its own random state
        if not parallel.main():
            return
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_text(folder / WHOLE, "")
        _remove_old(folder.parent, state.best_model_checkpoint)
