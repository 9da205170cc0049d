"""GGUF for llama.cpp: architecture `deci`, whose heads and widths are arrays over the layers, or `llama` where all are alike.

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

from LLMPruner.errors import UsageError
from LLMPruner.export.layout import filled, is_uniform, laid_out, rope_settings
from LLMPruner.files import write_atomically
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
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# How Llama-3 splits text before its merges; llama.cpp knows the same rule by name.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Steps of a pre-tokenizer (as `_rule` sees them) and llama.cpp's name for them.
PRE_TOKENIZERS = {
    (("ByteLevel", False, True),): "gpt-2",
    (("Digits", True), ("ByteLevel", False, True)): "smollm",
    (("Split", LLAMA3_SPLIT, "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
}


def write_gguf(path: Path, loaded: LoadedModel, kind: str = "auto") -> None:
    """Write the model as `path`; `kind` is one of TYPES, or auto for the weights' own precision.

    Raises UsageError for a tokenizer or rotary scaling that llama.cpp could not be told of.
    """
    layout = filled(loaded.plan)
    if kind == "auto":
        kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[loaded.model.dtype]
    check_gguf(loaded.model.config.to_dict(), loaded.tokenizer)

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, "llama" if is_uniform(loaded.plan) else "deci")
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


def check_gguf(config: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise UsageError for a tokenizer or a rotary scaling that cannot be written. `config` is a model's config as a dict."""
    _pre_tokenizer(tokenizer)
    kind = rope_settings(config)["rope_type"]
    if kind not in ("default", "llama3", "linear"):
        raise UsageError(f"rotary scaling {kind!r} cannot be written as GGUF: choose the hf or padded export")


def _add_sizes(writer: GGUFWriter, loaded: LoadedModel, layout: PruningPlan, file_type: LlamaFileType) -> None:
    geometry, config = layout.geometry, loaded.model.config
    groups, channels = list(layout.kv_counts), list(layout.channel_counts)
    heads = [count * geometry.q_per_kv for count in groups]
    if is_uniform(loaded.plan):
        heads, groups, channels = heads[0], groups[0], channels[0]
    rope = rope_settings(config.to_dict())
    writer.add_name(Path(str(loaded.provenance.get("base_model", "model"))).stem + " pruned")
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
    for name, tensor in laid_out(loaded, layout):
        stem, kind = name.rsplit(".", 1)
        place, prefix = stem, ""
        if stem.startswith(f"{table.layers}."):
            index, place = stem.removeprefix(f"{table.layers}.").split(".", 1)
            prefix = f"blk.{index}."
        if place.endswith(rotated):
            tensor = _interleaved(tensor, layout.geometry.head_dim)
        yield f"{prefix}{NAMES[place]}.{kind}", tensor


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
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
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


def _pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name of the rule by which the tokenizer splits text before its merges. Raises UsageError for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    step = parts.get("pre_tokenizer") or {}
    steps = tuple(_rule(step) for step in step.get("pretokenizers", [step]))
    if parts.get("normalizer") is None and (parts.get("model") or {}).get("type") == "BPE" and steps in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[steps]
    raise UsageError(
        "the tokenizer's rule for splitting text is none that GGUF has a name for here (Llama-3, SmolLM, GPT-2): "
        "choose the hf or padded export, and convert that with llama.cpp's own script"
    )


def _rule(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a step of a tokenizer's pre-tokenizer splits text."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("add_prefix_space", True), step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    return kind, (step.get("pattern") or {}).get("Regex"), step.get("behavior"), step.get("invert", False)
