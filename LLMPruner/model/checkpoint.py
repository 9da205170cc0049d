"""The `.bin` checkpoint: one flat file of tensors and JSON strings, written atomically and never unpickled blindly.

Layout: the state dict at the top level, and beside the tensors the reserved string keys of `META_KEYS`, so that it loads with
`torch.load(weights_only=True)`. A nested `{"state_dict": ...}` under the name `pytorch_model.bin` would be loaded by
transformers without an error and with random weights, hence flat. The file is a zip; its member META_MEMBER has the reserved
strings again, so that they are read without torch.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.errors import DamagedError, RunError, UsageError
from LLMPruner.files import write_atomically

if TYPE_CHECKING:
    import torch

FORMAT = "LLMPruner/1"
META_KEYS = ("__format__", "__config__", "__generation_config__", "__plan__", "__tokenizer__", "__provenance__")
META_MEMBER = "llmpruner.json"


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
    meta = {"__format__": FORMAT, **meta}
    payload = {**meta, **{name: tensor.detach().cpu() for name, tensor in tensors.items()}}

    def write(temporary: Path) -> None:
        torch.save(payload, temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].split("/")[0]
            entry = zipfile.ZipInfo(f"{folder}/{META_MEMBER}")  # without a date: the same model is the same file
            archive.writestr(entry, json.dumps(meta))

    write_atomically(path, write)


def read_meta(path: Path) -> dict[str, str]:
    """The reserved strings of our `.bin`, read without torch where the file has them beside the pickle.

    Raises UsageError when the file is truncated, is another tool's pickle, or is not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            if "data.pkl" not in members:
                raise UsageError(f"{path} is not a checkpoint of this tool: it is a zip file without tensors")
            stored = archive.read(members[META_MEMBER]) if META_MEMBER in members else None
    except zipfile.BadZipFile as error:
        raise _why_not_a_zip(path) from error
    meta = _parse_meta(stored, path) if stored is not None else _split(_load(path))[1]  # older files have no such member
    if "__format__" not in meta:
        raise UsageError(
            f"{path} is a checkpoint of another tool (no {FORMAT} header): "
            "pass the dense Hugging Face directory, or a .bin that these scripts wrote"
        )
    if meta["__format__"] != FORMAT:
        raise UsageError(f"{path} has format {meta['__format__']}, this version reads {FORMAT}: update the tool")
    missing = [key for key in ("__config__", "__plan__", "__tokenizer__", "__provenance__") if key not in meta]
    if missing:
        raise DamagedError(f"{path} is damaged: it lacks {missing[0]}")
    return meta


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on CPU) and meta strings of our `.bin`. Raises UsageError as `read_meta` does.

    Raises RunError where it cannot be read, or holds what is no tensor.
    """
    import torch

    meta = read_meta(path)
    tensors = _split(_load(path))[0]
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise RunError(f"{path} is damaged: {name} is no tensor")
    return tensors, meta


def _parse_meta(stored: bytes, path: Path) -> dict[str, str]:
    try:
        meta = json.loads(stored)
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: its {META_MEMBER} is not JSON") from error
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise DamagedError(f"{path} is damaged: its {META_MEMBER} is not a record of strings")
    return meta


def _load(path: Path) -> dict[str, Any]:
    """The flat dict of the file, tensors memory-mapped. torch builds tensors and plain values only, and refuses the rest."""
    import torch

    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} pickles Python objects beside tensors, and a stranger's are never unpickled here: "
            "pass the dense Hugging Face directory, or a .bin that these scripts wrote"
        ) from error
    except RuntimeError as error:
        raise RunError(f"{path} is damaged and cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(payload, dict):
        raise UsageError(f"{path} is a checkpoint of another tool: it holds a {type(payload).__name__}, not named tensors")
    return payload


def _split(payload: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, and the reserved strings."""
    meta = {key: payload[key] for key in META_KEYS if isinstance(payload.get(key), str)}
    return {name: value for name, value in payload.items() if name not in meta}, meta


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
