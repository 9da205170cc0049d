"""The tables of the Llama-like families."""

from __future__ import annotations

from dataclasses import replace

from LLMPruner.families.family import Family, Projection, Sublayer

ATTENTION = Sublayer(
    name="attention",
    attribute="self_attn",
    norm="input_layernorm",
    unit="KV group",
    units="num_kv_heads",
    inputs=(
        Projection("q_proj", "group_width", bias="attention_bias", rotary=True),
        Projection("k_proj", "head_dim", bias="attention_bias", rotary=True),
        Projection("v_proj", "head_dim", bias="attention_bias"),
    ),
    output=Projection("o_proj", "group_width", bias="attention_bias"),
)
MLP = Sublayer(
    name="mlp",
    attribute="mlp",
    norm="post_attention_layernorm",
    unit="channel",
    units="intermediate_size",
    inputs=(
        Projection("gate_proj", "channel_width", bias="mlp_bias"),
        Projection("up_proj", "channel_width", bias="mlp_bias"),
    ),
    output=Projection("down_proj", "channel_width", bias="mlp_bias"),
    states_units="intermediate_size",
)
LLAMA = Family("llama", ATTENTION, MLP, pruned_type="pruned_llama")
# Without a sliding window, which model/source.py refuses, Mistral is the same function.
MISTRAL = replace(LLAMA, model_type="mistral", pruned_type=None)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL)}


def family_of(model_type: str | None) -> Family | None:
    """The family of a config's `model_type`, that of an hf export included; None where there is no table for it."""
    own = {family.pruned_type: family for family in FAMILIES.values() if family.pruned_type}
    return (FAMILIES | own).get(model_type)
