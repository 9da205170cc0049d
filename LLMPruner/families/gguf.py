"""How GGUF, the format of llama.cpp, words a family: its architecture's name, its tensors' names, the order of rotated rows."""

from __future__ import annotations

from dataclasses import dataclass

# Tensor names by the module's path in transformers, of a decoder layer without `model.layers.N.`.
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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """A `general.architecture` of GGUF: the family it holds, and whether it rotates pairs of rows (transformers: halves)."""

    family: str
    pairs: bool


ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True),  # a Mistral without a sliding window is written as one too
    "qwen2": Architecture("qwen2", pairs=False),
    "qwen3": Architecture("qwen3", pairs=False),
}


def architecture_of(family: str) -> str:
    """The architecture of a model of the family whose layers are all alike: a Mistral is a Llama there, without a window."""
    return next((name for name, found in ARCHITECTURES.items() if found.family == family), "llama")


def tensor_name(name: str, layers: str = "model.layers") -> str:
    """GGUF's name of the tensor that transformers calls `name`. Raises KeyError where it has none."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith(f"{layers}."):
        return f"{NAMES[stem]}.{kind}"
    index, place = stem.removeprefix(f"{layers}.").split(".", 1)
    return f"blk.{index}.{NAMES[place]}.{kind}"
