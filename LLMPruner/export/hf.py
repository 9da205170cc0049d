"""Hugging Face directories: `hf`, with a width of its own in every layer, and `padded`, a stock model for any loader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from LLMPruner.config import PLAN_FILE, PROVENANCE_FILE
from LLMPruner.export.card import model_card, portable
from LLMPruner.export.layout import counted, filled, is_stock, laid_out, stock
from LLMPruner.families.family import rope_settings
from LLMPruner.files import write_folder_atomically, write_json, write_text
from LLMPruner.plan import PruningPlan, expected_shapes

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

SHARD_BYTES = 5 << 30
SHIPPED = ("configuration_pruned_llama.py", "modeling_pruned_llama.py")
# vLLM needs AutoModel; save_pretrained would leave it out.
AUTO_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
# What a saved tokenizer tells of the machine that it was loaded on.
LOCAL = (
    "is_local",
    "local_files_only",
    "name_or_path",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "special_tokens_map_file",
)


def write_hf(path: Path, loaded: LoadedModel, measured: dict[str, Any]) -> None:
    """A directory of the model's own shapes; where a stock model has them a stock one, which needs no flag to load."""
    if is_stock(loaded.plan):
        write_padded(path, loaded, measured)  # of which nothing is padding
        return
    layout = filled(loaded.plan)
    table = layout.geometry.table
    modules = {"AutoConfig": "configuration_pruned_llama"}

    def write(folder: Path) -> None:
        config = _base_config(loaded, layout) | {
            "model_type": table.pruned_type,
            "architectures": [f"Pruned{table.name}ForCausalLM"],
            "auto_map": {
                auto: f"{modules.get(auto, 'modeling_pruned_llama')}.Pruned{table.name}{kind}"
                for auto, kind in AUTO_CLASSES.items()
            },
            "attention_output_bias": False,
            "mlp_output_bias": False,
            "per_layer_config": per_layer_config(layout),
        }
        _write_directory(folder, loaded, layout, config, measured)
        for name in SHIPPED:
            shutil.copyfile(Path(__file__).parent / name, folder / name)

    write_folder_atomically(path, write)


def write_padded(path: Path, loaded: LoadedModel, measured: dict[str, Any]) -> None:
    """A stock directory of the same function: every layer padded with zeros to the widest."""
    layout = stock(loaded.plan)
    size = layout.geometry

    def write(folder: Path) -> None:
        config = _base_config(loaded, layout) | {
            "model_type": size.family,
            "architectures": [f"{size.table.name}ForCausalLM"],
            **{key: None if key == size.table.slides[-1] else False for key in size.table.slides},
        }
        _write_directory(folder, loaded, layout, config, measured)

    write_folder_atomically(path, write)


def per_layer_config(layout: PruningPlan) -> dict[str, dict[str, Any]]:
    """What each layer has otherwise than the dense model, by layer and attribute."""
    geometry, layers = layout.geometry, {}
    dense = {
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "intermediate_size": geometry.intermediate_size,
        "attention_output_bias": False,
        "mlp_output_bias": False,
    }
    for index, (groups, channels) in enumerate(zip(layout.kv_counts, layout.channel_counts, strict=True)):
        own = {
            "num_attention_heads": groups * geometry.q_per_kv,
            "num_key_value_heads": groups,
            "intermediate_size": channels,
            **{
                f"{part.name}_output_bias": layout.has_output_bias(part.name, index) and not geometry.has_bias(part.output)
                for part in geometry.table.sublayers
            },
        }
        different = {name: value for name, value in own.items() if value != dense[name]}
        if different:
            layers[str(index)] = different
    return layers


def _base_config(loaded: LoadedModel, layout: PruningPlan) -> dict[str, Any]:
    config, size = loaded.model.config.to_dict(), layout.geometry
    for name in ("_name_or_path", "quantization_config", "auto_map"):
        config.pop(name, None)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    removed = {
        "removed_attention": [index for index, groups in enumerate(loaded.plan.kv_counts) if not groups],
        "removed_mlp": [index for index, channels in enumerate(loaded.plan.channel_counts) if not channels],
    }
    biases = {part.bias for sublayer in size.table.sublayers for part in sublayer.projections if isinstance(part.bias, str)}
    return config | {
        **{name: getattr(size, name) for name in sorted(biases)},
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "intermediate_size": size.intermediate_size,
        "head_dim": size.head_dim,
        "tie_word_embeddings": size.tied_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,  # read before transformers 4.56
        **_rope(config),
        **{name: layers for name, layers in removed.items() if layers},
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in the words of transformers 5 and of 4, which would silently fall back to theta 10000."""
    settings = rope_settings(config)
    scaling = {name: value for name, value in settings.items() if name != "rope_theta"}
    return {
        "rope_parameters": settings,
        "rope_theta": settings["rope_theta"],
        "rope_scaling": None if settings["rope_type"] == "default" else scaling,
    }


def _write_directory(
    folder: Path, loaded: LoadedModel, layout: PruningPlan, config: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Weights, config, generation config, tokenizer with its chat template, card, plan and provenance."""
    _write_shards(folder, loaded, layout)
    write_json(folder / "config.json", config)
    # as it is: save_pretrained would refuse sampling settings that well-known models carry beside greedy decoding
    write_text(folder / "generation_config.json", loaded.model.generation_config.to_json_string())
    _write_tokenizer(folder, loaded.tokenizer)
    write_text(folder / "README.md", model_card(loaded, layout, measured, form="own" if "auto_map" in config else "stock"))
    write_text(folder / PLAN_FILE, loaded.plan.to_json() + "\n")
    record = {"parameters": counted(loaded.plan, layout), "measured": measured}
    write_json(folder / PROVENANCE_FILE, portable(loaded.provenance) | record)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's files, in words that transformers 4.57 and 5 both know, and without a word about this machine.

    5 names a class that 4.57 does not know: the older name suits both. 4.57 would hand the model `token_type_ids`, which no
    Llama takes, unless told what it takes.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings = {name: value for name, value in settings.items() if name not in LOCAL}
    write_json(path, settings | {"model_input_names": ["input_ids", "attention_mask"]})


def _write_shards(folder: Path, loaded: LoadedModel, layout: PruningPlan, limit: int = SHARD_BYTES) -> None:
    """Safetensors shards of up to `limit` bytes and their index; one shard is in memory at a time beside the model."""
    itemsize = loaded.model.dtype.itemsize
    shapes = {name: torch.Size(shape) for name, shape in expected_shapes(layout).items()}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: shape.numel() * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for name, wanted in split.filename_to_tensors.items():
        part = {found: tensor.contiguous() for found, tensor in laid_out(loaded, layout, wanted)}
        save_file(part, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors' own mode would keep a server's user out
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
