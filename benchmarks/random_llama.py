"""Llamas of random weights and any size, as a Hugging Face directory with a tokenizer of bytes: what they say means nothing,
what they cost is what a model of that size costs. Written shard by shard, so that a large one needs little memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from LLMPruner.files import write_json
from LLMPruner.plan import Geometry, PruningPlan, expected_shapes

# Sizes as their config.json states them.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def small(layers: int, width: int, vocab_size: int = 4096) -> dict[str, Any]:
    """The config of a Llama of `layers` layers and `width`, in Llama-3's proportions: 4:1 heads, 3.5 channels a column."""
    heads = max(4, width // 64)
    sizes = {"hidden_size": width, "intermediate_size": 7 * width // 2, "num_hidden_layers": layers, "vocab_size": vocab_size}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "max_position_embeddings": 4096}


def write_config(folder: Path, sizes: Mapping[str, Any]) -> Geometry:
    """`config.json` alone: enough for a forecast."""
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | dict(sizes)
    write_json(folder / "config.json", config)
    return Geometry.from_config(config)


def write_model(folder: Path, sizes: Mapping[str, Any], *, seed: int = 0) -> Geometry:
    """The whole directory: config, bfloat16 weights in one shard a layer, and the tokenizer."""
    geometry, torch_seed = write_config(folder, sizes), torch.Generator().manual_seed(seed)
    index, shards = {}, list(_shards(geometry))
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(name, shape, geometry, torch_seed) for name, shape in names.items()}, folder / file)
        index |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    _tokenizer().save_pretrained(folder)
    return geometry


def _shards(geometry: Geometry) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file: what stands around the layers, and each layer."""
    shapes, prefix = expected_shapes(PruningPlan.dense(geometry)), f"{geometry.table.layers}."
    yield {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    for layer in range(geometry.num_layers):
        yield {name: shape for name, shape in shapes.items() if name.startswith(f"{prefix}{layer}.")}


def _random(name: str, shape: tuple[int, ...], geometry: Geometry, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 0.02 / (2 * geometry.num_layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
    values = torch.empty(shape, dtype=torch.float32).uniform_(-1, 1, generator=generator)  # three times as fast as normal
    return values.mul_(scale * 3**0.5).bfloat16()


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any vocabulary is large enough."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def read_metrics(folder: Path) -> dict[str, Any]:
    """What a run wrote of itself."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
