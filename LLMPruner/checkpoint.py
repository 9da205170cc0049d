"""The `.bin` checkpoint: one flat file of tensors and JSON strings, written atomically and never unpickled blindly.

Layout: the state dict at the top level, and beside the tensors the reserved string keys of `META_KEYS`. It loads with
`torch.load(weights_only=True)`. A nested `{"state_dict": ...}` under the name `pytorch_model.bin` would be loaded by
transformers without an error and with random weights, hence flat.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import DamagedError, RunError, UsageError

if TYPE_CHECKING:
    import torch

FORMAT = "LLMPruner/1"
META_KEYS = ("__format__", "__config__", "__generation_config__", "__plan__", "__tokenizer__", "__provenance__")

# What `torch.save` writes for plain tensors; any other global in the pickle means somebody's objects.
_TENSOR_GLOBALS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary_path)`, flush it to disk, then rename it over `path`: never a half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary_folder)`, flush its files to disk, then rename it to `path`, in the place of what was there."""
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():  # stopped between the two renames
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically. Raises ValueError on NaN or infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> None:
    """Write `tensors` and the JSON strings `meta` (keys of META_KEYS, without `__format__`) as one flat file.

    Every tensor must own its storage: a view would save its whole base. Raises ValueError on a view or unknown key.
    """
    import torch

    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            raise ValueError(f"{name} is a view: clone it before saving")
    unknown = set(meta) - set(META_KEYS)
    if unknown:
        raise ValueError(f"unknown checkpoint keys: {sorted(unknown)}")
    payload = {"__format__": FORMAT, **meta, **{name: tensor.detach().cpu() for name, tensor in tensors.items()}}
    write_atomically(path, lambda temporary: torch.save(payload, temporary))


def require_free_space(directory: Path, needed: int, what: str) -> None:
    """Raise UsageError unless the disk of `directory` (or its nearest existing parent) has `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(
            f"{what} needs {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free: "
            "free some space, or run from a directory on a larger disk"
        )


def read_meta(path: Path) -> dict[str, str]:
    """The reserved strings of our `.bin`, read without torch and without executing the pickle.

    Raises UsageError when the file is truncated, is another tool's pickle, or is not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise UsageError(f"{path} is not a checkpoint of this tool: it is a zip file without tensors")
            pickled = archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise _why_not_a_zip(path) from error
    meta, foreign = _scan_pickle(pickled, path)
    if meta.get("__format__") is None:
        reason = f"it pickles {foreign[0]}, and such objects are never unpickled here" if foreign else f"no {FORMAT} header"
        raise UsageError(
            f"{path} is a checkpoint of another tool ({reason}): "
            "pass the dense Hugging Face directory, or a .bin that these scripts wrote"
        )
    if foreign:
        raise UsageError(f"{path} is not safe to load: it pickles {foreign[0]} beside its tensors")
    if meta["__format__"] != FORMAT:
        raise UsageError(f"{path} has format {meta['__format__']}, this version reads {FORMAT}: update the tool")
    missing = [key for key in ("__config__", "__plan__", "__tokenizer__", "__provenance__") if key not in meta]
    if missing:
        raise DamagedError(f"{path} is damaged: it lacks {missing[0]}")
    return meta


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on CPU) and meta strings of our `.bin`. Raises UsageError as `read_meta` does."""
    import torch

    read_meta(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} is damaged and cannot be read: {str(error).splitlines()[0]}") from error
    meta = {key: payload.pop(key) for key in META_KEYS if key in payload}
    return payload, meta


def _why_not_a_zip(path: Path) -> UsageError:
    with open(path, "rb") as handle:
        head = handle.read(4)
    if head[:2] == b"PK":
        return DamagedError(f"{path} is truncated: copy or save it again")
    if not head:
        return DamagedError(f"{path} is empty: copy or save it again")
    if head[:1] == b"\x80":
        return UsageError(
            f"{path} is a pickled checkpoint of another tool: Python objects of strangers are never unpickled here"
        )
    return UsageError(f"{path} is not a checkpoint of this tool")


def _scan_pickle(pickled: bytes, path: Path) -> tuple[dict[str, str], list[str]]:
    """Walk the opcodes (never executing them): the meta strings, and the globals that are not plain tensors."""
    meta: dict[str, str] = {}
    foreign: list[str] = []
    key: str | None = None
    strings: list[str] = []
    memo: dict[int, str | None] = {}  # a string that occurs twice is pickled once and fetched by number
    last: str | None = None
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = last
                continue
            fetched = memo.get(argument) if opcode.name in ("BINGET", "LONG_BINGET") else None
            last = argument if "UNICODE" in opcode.name else fetched
            if opcode.name == "GLOBAL" and not _is_tensor_global(argument):
                foreign.append(argument.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and not _is_tensor_global(" ".join(strings[-2:])):
                foreign.append(".".join(strings[-2:]))
            elif opcode.name == "INST":
                foreign.append(argument.replace(" ", "."))
            if last is not None:
                strings.append(last)
                if key is not None:
                    meta.setdefault(key, last)
                key = last if key is None and last in META_KEYS else None
            else:
                key = None
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: its pickle does not parse") from error
    return meta, foreign


def _is_tensor_global(name: str) -> bool:
    if name in _TENSOR_GLOBALS:
        return True
    module, _, attribute = name.partition(" ")
    return module == "torch" and (attribute.endswith("Storage") or attribute in {"bfloat16", "float16", "float32"})
