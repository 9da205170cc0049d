"""Layers that are done, each in a safetensors file of its own: the home of streamed layers, and where a dead run goes on.

An index says which file holds a layer and what was done to it. Files are written under new names, the index is replaced, and
only then do the old files go: whenever the process dies, the index names whole layers of one state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.errors import RunError
from LLMPruner.files import write_atomically, write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

INDEX = "layers.json"
UNCHANGED = "unchanged"  # a layer that is here for its precision alone


def is_marked(path: Path, run: str) -> bool:
    """Whether a safetensors file is there, and is one that this run has kept."""
    from safetensors import safe_open

    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("run") == run


class FinishedLayers:
    """Finished layers in `folder`, by index: file and state, one word for what was done to them. Those of another `run` do not
    count."""

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder, self.run = folder, run
        self._entries: dict[int, dict[str, str]] = {}
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            if index.get("run") == run:
                self._entries = {int(layer): entry for layer, entry in index["layers"].items()}

    def __contains__(self, index: int) -> bool:
        return index in self._entries

    def state(self, index: int) -> str | None:
        """What was done to a layer; None where that is nothing, or not finished."""
        state = self._entries.get(index, {}).get("state")
        return None if state == UNCHANGED else state

    def write(self, layers: Mapping[int, nn.Module], state: str) -> None:
        """Keep the layers, all or, where the process dies, none of them; of several processes the first one writes."""
        entries, replaced = dict(self._entries), []
        for index, layer in layers.items():
            name = f"layer_{index:03d}.safetensors"
            if entries.get(index, {}).get("file") == name:
                name = f"layer_{index:03d}_2.safetensors"
            replaced += [entries[index]["file"]] if index in entries else []
            entries[index] = {"file": name, "state": state}
            if parallel.main():
                self._write_layer(name, layer)
        if parallel.main():
            listed = {str(index): entry for index, entry in sorted(entries.items())}
            write_json(self.folder / INDEX, {"run": self.run, "layers": listed})
        self._entries = entries
        parallel.wait()  # before that the new files may not be there, and after it nobody reads the old ones
        if parallel.main():
            for name in replaced:
                (self.folder / name).unlink(missing_ok=True)

    def _write_layer(self, name: str, layer: nn.Module) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().contiguous() for key, value in layer.state_dict().items()}
        write_atomically(self.folder / name, lambda path: save_file(tensors, path))

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's tensors by their names within it, mapped into memory."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / self._entries[index]["file"]
        try:
            with safe_open(path, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a handle, not a dict)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
