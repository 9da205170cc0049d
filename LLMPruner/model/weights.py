"""The weight files of a Hugging Face directory: which they are, and what their headers say. Read without torch.

Safetensors headers give name, type, shape and place of every tensor, so that a model that its config does not describe is
refused before a weight is read (format: github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.plan import PruningPlan, expected_shapes, removed_prefixes

logger = logging.getLogger("LLMPruner")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
IGNORED = "rotary_emb.inv_freq"  # rotary tables that old checkpoints carry: they follow from the config
TYPES = ("F64", "F32", "F16", "BF16")  # of weights; what else a file may hold is quantized
_BLOCK = 1 << 22  # bytes compared at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file: its type as the file names it, its shape, and its bytes `start` to `stop` of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_names(folder: Path, *, assumed: bool = False) -> list[str]:
    """The files that hold the model: those of the index, else `model.safetensors`; whatever else lies there does not count.

    Raises UsageError where there is neither (unless the latter is `assumed`), DamagedError for a broken index.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("no names of files")
            return sorted(names)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{index} is damaged and cannot be read: copy the model again") from error
    if assumed or (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / "adapter_config.json").is_file():
        raise UsageError(adapter_message(folder))
    raise UsageError(
        f"{folder} has no safetensors weights ({SINGLE}, or shards with {INDEX}): convert the model to safetensors first"
    )


def has_weights(folder: Path) -> bool:
    """Whether a directory has weight files, or names some."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def warn_of_others(folder: Path) -> None:
    """Say what lies beside the weights and is not read, where transformers would read it."""
    names = weight_names(folder)
    if (folder / SINGLE).is_file() and SINGLE not in names:
        logger.warning("%s has %s beside its shards: the shards that its index names are read", folder, SINGLE)
    if (folder / "adapter_config.json").is_file():
        logger.warning("%s has a PEFT adapter beside its weights, which is not applied: merge it first if it is wanted", folder)


def adapter_message(folder: Path) -> str:
    """What to do about a folder that holds a PEFT adapter and no model."""
    return f"{folder} is a PEFT adapter, not a model: merge it into its base model first (merge_and_unload) and save the result"


def read_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the directory's weight files, by name. Raises DamagedError where a file is missing or broken."""
    stored: dict[str, Stored] = {}
    for name in weight_names(folder):
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder} lacks {name}, which its index names: copy the model again")
        for tensor, entry in _header(path):
            if tensor in stored:
                raise DamagedError(f"{folder} has {tensor} in two files: copy the model again")
            stored[tensor] = entry
    return stored


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Names and places of the tensors of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    broken, size = f"{path} is damaged and cannot be read: copy the model again", path.stat().st_size
    try:
        with safe_open(path, framework="np"):  # checks that types, shapes and places fit each other and the file
            pass
    except (SafetensorError, OSError) as error:
        raise DamagedError(broken) from error
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= size - 8:
            raise DamagedError(broken)
        try:
            entries: Mapping[str, Any] = json.loads(handle.read(length))
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, stop = (8 + length + offset for offset in entry["data_offsets"])
                    yield name, Stored(path, entry["dtype"], tuple(entry["shape"]), start, stop)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(broken) from error


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.path, "rb") as ours, open(other.path, "rb") as theirs:
        ours.seek(one.start)
        theirs.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            size = min(left, _BLOCK)
            if ours.read(size) != theirs.read(size):
                return False
            left -= size
    return True


def check_shapes(where: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan) -> None:
    """Raise DamagedError unless the tensors of `shapes` are exactly those of the plan: none missing, none left over.

    What stands for removed sublayers may be there, and a tied head and old rotary tables are passed over.
    """
    expected, needless = expected_shapes(plan), passed_over(plan)
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected and not needless(name)]
    if missing and unknown:
        raise DamagedError(
            f"{where} names its weights otherwise than its config's model, {unknown[0]} for one where {missing[0]} is missing: "
            f"load it in transformers as {plan.geometry.table.name}ForCausalLM and save that with save_pretrained"
        )
    if missing:
        raise DamagedError(f"{where} lacks weights that its config asks for, {missing[0]} for one: copy the model again")
    if unknown:
        raise DamagedError(
            f"{where} has weights that its config does not describe, {unknown[0]} for one, without which it is another model: "
            "correct the config, or pass the model as it was published"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise DamagedError(f"{where}: {name} has shape {tuple(shapes[name])} where its config says {shape}")


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is no weight."""
    return name.endswith(IGNORED)


def passed_over(plan: PruningPlan) -> Callable[[str], bool]:
    """Whether a stored tensor, by its name, is none of the plan's model: what stands for a removed sublayer, a head that
    is the embedding again, an old rotary table."""
    removed = removed_prefixes(plan)
    tied_head = f"{plan.geometry.table.head}.weight" if plan.geometry.tied_embeddings else None
    return lambda name: name == tied_head or is_ignored(name) or name.startswith(removed)
