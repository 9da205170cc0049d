"""The tables of the Llama-like families."""

from __future__ import annotations

from dataclasses import replace

from LLMPruner.families.family import Family, Projection, Sublayer, Whole

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
LLAMA = Family("llama", "Llama", ATTENTION, MLP)


def _with_biases(sublayer: Sublayer, inputs: bool | str, output: bool | str) -> Sublayer:
    """The sublayer with such biases at its inputs' projections and at its output's."""
    projections = tuple(replace(projection, bias=inputs) for projection in sublayer.inputs)
    return replace(sublayer, inputs=projections, output=replace(sublayer.output, bias=output))


NO_BIAS = _with_biases(MLP, False, False)
MISTRAL = Family(
    "mistral",
    "Mistral",
    _with_biases(ATTENTION, False, False),
    NO_BIAS,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    slides=("sliding_window",),
)
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
QWEN2 = Family(
    "qwen2",
    "Qwen2",
    _with_biases(ATTENTION, True, False),
    NO_BIAS,
    defaults=QWEN,
    states_head_dim=False,
    slides=("use_sliding_window", "sliding_window"),
)
# The norms of a query's and a key's head are one head wide and shared by all heads.
QWEN3 = Family(
    "qwen3",
    "Qwen3",
    replace(ATTENTION, whole=(Whole("q_norm", "head_dim"), Whole("k_norm", "head_dim"))),
    NO_BIAS,
    defaults=QWEN | {"head_dim": 128},
    slides=("use_sliding_window", "sliding_window"),
)

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(model_type: str | None) -> Family | None:
    """The family of a config's `model_type`, that of an hf export included; None where there is no table for it."""
    own = {family.pruned_type: family for family in FAMILIES.values()}
    return (FAMILIES | own).get(model_type)
