"""GGUF for llama.cpp: architecture `deci`, whose heads and widths are arrays over the layers, or the family's own where all
are alike.

Tensors are converted and written one at a time, so that no second model is held in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, SpecialVocab, TokenType
from gguf.quants import quantize
from gguf.utility import size_label

from LLMPruner.errors import UsageError
from LLMPruner.export.card import base_name, beside, check_beside, model_card, modelfile, portable, removed_parameters
from LLMPruner.export.layout import filled, is_stock, laid_out
from LLMPruner.families.family import rope_settings
from LLMPruner.families.gguf import ARCHITECTURES, architecture_of, tensor_name
from LLMPruner.families.llama import family_of
from LLMPruner.files import write_atomically, write_text
from LLMPruner.model.gguf_tokenizer import pre_tokenizer_name
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from LLMPruner.model.load import LoadedModel

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # values of a Q8_0 block; rows that are no multiple of it stay in float16


def write_gguf(path: Path, loaded: LoadedModel, kind: str = "auto", measured: Mapping[str, Any] | None = None) -> None:
    """Write the model as `path`, and its card and Modelfile beside it; `kind` is one of TYPES, or auto for the weights' own.

    `measured` are PPL results by role. Raises UsageError for what llama.cpp could not be told of, and where a file that no
    export wrote stands in the card's or the Modelfile's place.
    """
    layout = filled(loaded.plan)
    if kind == "auto":
        kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[loaded.model.dtype]
    check_gguf(loaded.model.config.to_dict(), loaded.tokenizer, uniform=is_stock(loaded.plan))
    check_beside(path)

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, _architecture(loaded.plan))
        _add_record(writer, loaded)
        _add_sizes(writer, loaded, layout, TYPES[kind][1])
        _add_tokenizer(writer, loaded.tokenizer, layout.geometry.vocab_size)
        for name, tensor in _tensors(loaded, layout):
            raw = _type_of(tensor, TYPES[kind][0])
            writer.add_tensor_info(name, tuple(tensor.shape), _numpy_dtype(raw), _bytes(tensor, raw), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(loaded, layout):
            writer.write_tensor_data(_encoded(tensor, _type_of(tensor, TYPES[kind][0])))
        writer.close()

    write_atomically(path, write)
    card, recipe = beside(path)
    write_text(card, model_card(loaded, layout, dict(measured or {}), form=path.name))
    write_text(recipe, modelfile(path.name, loaded.tokenizer, _stops(loaded)))


def _stops(loaded: LoadedModel) -> list[str]:
    """The tokens that end what the model writes."""
    ids = loaded.model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    tokens = [loaded.tokenizer.eos_token, *(loaded.tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None)]
    return [token for token in dict.fromkeys(tokens) if token]


def _architecture(plan: PruningPlan) -> str:
    return architecture_of(plan.geometry.family) if is_stock(plan) else "deci"


def check_gguf(config: Mapping[str, Any], tokenizer: Any, *, uniform: bool) -> None:
    """Raise UsageError for what cannot be written. `config` is a model's config as a dict; `uniform`: all layers are alike."""
    pre_tokenizer_name(tokenizer)
    unsaid = _unsaid(config, uniform)
    if unsaid is not None:
        raise UsageError(f"{unsaid} cannot be written as GGUF: choose the hf or padded export")


def _unsaid(config: Mapping[str, Any], uniform: bool) -> str | None:
    """What the config says that llama.cpp's graph could not be told; it would compute without it."""
    rope = rope_settings(config)
    kind = rope["rope_type"]
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    family = family_of(config.get("model_type"))
    norms = [norm for sublayer in (family.sublayers if family else ()) for norm in (*sublayer.whole, *sublayer.wraps)]
    found = {
        f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") not in ("silu", "swish"),
        f"rotary scaling {kind!r}": kind not in ("default", "llama3", "linear"),
        "rotary settings of their own for some layers": any(isinstance(value, Mapping) for value in rope.values()),
        f"the rotation of a part of each head (partial_rotary_factor {partial})": partial != 1,
        f"a pruned {config.get('model_type')}, whose layers have norms inside,": bool(norms) and not uniform,
    }
    return next((what for what, so in found.items() if so), None)


def _add_record(writer: GGUFWriter, loaded: LoadedModel) -> None:
    """What the model is and how it came about: `general.*` as llama.cpp shows it, `llmpruner.*` for who looks closer."""
    record, removed = portable(loaded.provenance), removed_parameters(loaded)
    total, repo, name = loaded.plan.total_params, record.get("base_repo"), base_name(loaded.provenance)
    writer.add_type("model")
    writer.add_name(f"{name} pruned" if removed else name)
    writer.add_basename(name)
    writer.add_size_label(size_label(total, 0, 0, 0))
    if removed:
        writer.add_finetune("pruned")
        writer.add_tags(["pruned", "structured-pruning", "text-generation"])
        writer.add_description(f"{name}, {removed / (total + removed):.1%} of its parameters removed by structured pruning")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        if repo:
            writer.add_base_model_organization(0, repo.split("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{repo}")
    writer.add_string("llmpruner.base_model", str(record.get("base_model", "")))
    writer.add_uint64("llmpruner.parameters", total)
    writer.add_uint64("llmpruner.dense_parameters", total + removed)
    writer.add_float32("llmpruner.pruning_ratio", removed / (total + removed))
    writer.add_string("llmpruner.settings", json.dumps(record.get("settings") or {}))
    writer.add_string("llmpruner.provenance", json.dumps(record))


def _add_sizes(writer: GGUFWriter, loaded: LoadedModel, layout: PruningPlan, file_type: LlamaFileType) -> None:
    geometry, config = layout.geometry, loaded.model.config
    groups, channels = list(layout.kv_counts), list(layout.channel_counts)
    heads = [count * geometry.q_per_kv for count in groups]
    if is_stock(loaded.plan):
        heads, groups, channels = heads[0], groups[0], channels[0]
    rope = rope_settings(config.to_dict())
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(geometry.vocab_size)
    writer.add_context_length(geometry.max_positions)
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_block_count(geometry.num_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tensors(loaded: LoadedModel, layout: PruningPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every GGUF tensor."""
    factors = _rope_factors(loaded.model)
    if factors is not None:
        yield "rope_freqs.weight", factors
    table = layout.geometry.table
    rotated = tuple(f".{part.name}" for part in table.attention.inputs if part.rotary)
    own = ARCHITECTURES.get(_architecture(loaded.plan))
    pairs = own is None or own.pairs
    for name, tensor in laid_out(loaded, layout):
        if pairs and name.rsplit(".", 1)[0].endswith(rotated):
            tensor = _interleaved(tensor, layout.geometry.head_dim)  # deci rotates pairs, as llama does
        yield tensor_name(name, table.layers), tensor


def _interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k `(heads * head_dim, ...)` from transformers' rotary order (halves) to llama.cpp's (pairs)."""
    heads = tensor.shape[0] // head_dim
    return tensor.reshape(heads, 2, head_dim // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _rope_factors(model: Any) -> torch.Tensor | None:
    """By what Llama-3.1's scaling divides each rotary frequency, float32 `(head_dim / 2,)`; None where it has none."""
    rope = rope_settings(model.config.to_dict())
    if rope["rope_type"] != "llama3":
        return None
    scaled = model.model.rotary_emb.inv_freq.float().cpu()
    plain = rope["rope_theta"] ** (-torch.arange(0, len(scaled)).double() / len(scaled))
    return (plain / scaled.double()).float()


def _type_of(tensor: torch.Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim == 1:  # norms, biases and rotary factors
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _numpy_dtype(raw: GGMLQuantizationType) -> numpy.dtype:
    return numpy.dtype({"F32": numpy.float32, "F16": numpy.float16}.get(raw.name, numpy.float32))


def _bytes(tensor: torch.Tensor, raw: GGMLQuantizationType) -> int:
    if raw == GGMLQuantizationType.Q8_0:
        return tensor.numel() // BLOCK * (BLOCK + 2)
    return tensor.numel() * (4 if raw == GGMLQuantizationType.F32 else 2)


def _encoded(tensor: torch.Tensor, raw: GGMLQuantizationType) -> numpy.ndarray:
    values = tensor.detach().float().cpu().contiguous().numpy()
    if raw in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return values.astype(_numpy_dtype(raw))
    return quantize(values, raw)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Byte-level BPE: tokens, their types, merges, special tokens, and the chat template."""
    added = tokenizer.added_tokens_decoder
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    listed, types = [], []
    for index in range(vocab_size):
        listed.append(tokens.get(index, f"[PAD{index}]"))
        if index not in tokens:
            types.append(TokenType.UNUSED)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(listed)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    ids = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "eos": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
    template = tokenizer.chat_template
    special.chat_template = template.get("default") if isinstance(template, dict) else template
    special.add_to_gguf(writer, quiet=True)
