"""A Hugging Face directory, inspected without torch: its config, its plan, and what its weight files hold.

What is checked early and what is loaded late come from this one description.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from LLMPruner.config import PLAN_FILE, PROVENANCE_FILE
from LLMPruner.errors import UsageError
from LLMPruner.families.llama import FAMILIES, family_of
from LLMPruner.files import read_json_file
from LLMPruner.model.weights import TYPES, Stored, adapter_message, check_shapes, is_ignored, read_stored, same_values
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

logger = logging.getLogger("LLMPruner")

RECORDS = ("settings", "calibration", "versions", "measured", "finetune")  # parts of a provenance that are mappings
# What a config may hold where Python takes almost anything for true or false.
SWITCHES = {
    "tie_word_embeddings": (bool, NoneType),
    "use_sliding_window": (bool, NoneType),
    "sliding_window": (int, NoneType),
    "layer_types": (list, NoneType),
}
# What a config may say and no module of ours would do.
UNSUPPORTED = {
    "num_local_experts": "is a mixture of experts",
    "num_experts": "is a mixture of experts",
    "transformers_weights": "names other weight files than the usual ones: pass the model as it was published",
    "quantization_config": "is quantized: pass the model in full precision and quantize what was pruned",
}


@dataclass(frozen=True)
class Directory:
    """What a directory says of its model; `config` as it holds for the weights, `meta` as a `.bin` has it."""

    config: Mapping[str, Any]
    geometry: Geometry
    plan: PruningPlan
    meta: Mapping[str, str]


def inspect_directory(folder: Path, *, weights: bool = True, faulty: bool = False) -> Directory:
    """Inspect a directory; without `weights` (a hub model whose weights are not there yet) its config alone.

    Raises UsageError where it is no model of a known family, DamagedError where its weights are not those of its config;
    `faulty` passes over the latter, for a diagnosis.
    """
    config = _read_config(folder)
    Geometry.from_config(config)  # a config that is none is told before weights are missed
    stored = read_stored(folder) if weights else {}
    _check_types(folder, stored)
    config = _with_own_head(folder, config, stored)
    geometry = Geometry.from_config(config)
    plan = _directory_plan(folder, config, geometry)
    if weights and not faulty:
        check_shapes(folder, {name: entry.shape for name, entry in stored.items()}, plan)
    return Directory(config, geometry, plan, _provenance(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(adapter_message(folder))
        raise UsageError(f"{folder} is not a model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    family = family_of(kind) if isinstance(kind, str) else None
    if family is None:
        raise UsageError(
            f"{folder} is of no family that this tool prunes: its model_type is {kind!r}, known are {', '.join(FAMILIES)} "
            "(CLAUDE.md says how to add one)"
        )
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            raise UsageError(f"{folder} {why}" if ":" in why else f"{folder} {why}: this tool prunes dense models only")
    if config.get("sliding_window") is not None and not family.slides:
        raise UsageError(f"{folder} attends in a sliding window, which no {family.model_type} does: correct its config.json")
    for key, kinds in SWITCHES.items():
        if not isinstance(config.get(key), kinds):
            raise UsageError(
                f"{path} has {key} = {config[key]!r}, which is no {' or '.join(k.__name__ for k in kinds[:-1])}: correct it"
            )
    known = ("full_attention", *(["sliding_attention"] if family.window(config) else []))
    for layer in config.get("layer_types") or ():
        if layer not in known:
            raise UsageError(f"{folder} has layers of the kind {layer!r}: only full attention is supported")
    return config


def _check_types(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Raise UsageError where weights are stored in a type that means nothing without more: integers, eight-bit floats."""
    for name, entry in stored.items():
        if entry.dtype not in TYPES and not is_ignored(name):
            raise UsageError(f"{folder} stores {name} as {entry.dtype}: pass the model in full precision, not quantized")


def _with_own_head(folder: Path, config: dict[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """The config, untied where the weights have a head that is not the embedding: it is what the model was trained with."""
    table = family_of(config["model_type"])
    head, embedding = stored.get(f"{table.head}.weight"), stored.get(f"{table.embedding}.weight")
    if not config.get("tie_word_embeddings", False) or head is None or embedding is None or same_values(head, embedding):
        return config
    logger.warning("%s: its config ties head and embedding, but its weights hold a head of its own, which is kept", folder)
    return {**config, "tie_word_embeddings": False}


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
        exported = (folder / PROVENANCE_FILE).is_file()  # elsewhere the keys mean nothing: the weights count
        no_attention, no_mlp = (exported and config.get(f"removed_{name}") or () for name in ("attention", "mlp"))
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
