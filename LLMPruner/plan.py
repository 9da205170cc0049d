"""The pruning plan: which KV groups and MLP channels every layer keeps, in integers.

The plan is decided once (importance, allocation) and read by everything downstream: slicing, repair, checkpoint, plots,
diagnosis. No torch here, so that a plan can be checked before anything heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from LLMPruner.errors import UsageError


@dataclass(frozen=True)
class Geometry:
    """The sizes of a dense Llama, read from its config; parameter counts follow from them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        sizes = (*sizes, "max_positions")
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"the model config is not a usable Llama: {name} is {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"the model config is not a usable Llama: {self.num_heads} query heads "
                f"do not divide into {self.num_kv_heads} KV heads"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a Llama `config.json` (as a dict). Raises UsageError where a size is missing."""
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
                max_positions=config.get("max_position_embeddings") or 2048,
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UsageError(f"the model config is not a usable Llama: {error} is missing or wrong") from error

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head: 4 on Llama-3, 3 on SmolLM2, 1 for multi-head attention."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_width(self) -> int:
        """Columns of o_proj (rows of q_proj) that belong to one KV group."""
        return self.q_per_kv * self.head_dim

    @property
    def group_params(self) -> int:
        """Parameters of one KV group: its rows of q, k, v (with their biases) and its columns of o."""
        rows = (self.q_per_kv + 2) * self.head_dim
        return rows * (self.hidden_size + self.attention_bias) + self.group_width * self.hidden_size

    @property
    def channel_params(self) -> int:
        """Parameters of one MLP channel: its rows of gate and up (with their biases) and its column of down."""
        return 3 * self.hidden_size + 2 * self.mlp_bias

    @property
    def attention_params(self) -> int:
        """Prunable parameters of one dense attention sublayer."""
        return self.num_kv_heads * self.group_params

    @property
    def mlp_params(self) -> int:
        """Prunable parameters of one dense MLP sublayer."""
        return self.intermediate_size * self.channel_params

    @property
    def fixed_params(self) -> int:
        """Parameters that pruning never touches: embeddings, head, norms and the biases of o_proj and down_proj."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        per_layer = self.hidden_size * (2 + self.attention_bias + self.mlp_bias)
        return embeddings + self.num_layers * per_layer + self.hidden_size

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model, tied embeddings counted once."""
        return self.fixed_params + self.num_layers * (self.attention_params + self.mlp_params)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: KV groups and MLP channels, as ascending indices into the dense layer. None: no such sublayer."""

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """For every layer the kept KV groups and MLP channels. Immutable; checks itself against the geometry.

    With `output_bias` the output projection of every pruned sublayer has a bias, whether or not the dense model has one.
    """

    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    output_bias: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != self.geometry.num_layers:
            raise UsageError(f"the plan has {len(self.layers)} layers, the model has {self.geometry.num_layers}")
        for index, layer in enumerate(self.layers):
            _check_kept(index, "KV group", layer.kv_groups, self.geometry.num_kv_heads)
            _check_kept(index, "channel", layer.channels, self.geometry.intermediate_size)
        if not self.layers[0].kv_groups:  # the KV cache counts its tokens there, and so does llama.cpp
            raise UsageError("layer 0 keeps no KV group: its attention must stay")

    @classmethod
    def dense(cls, geometry: Geometry) -> PruningPlan:
        """The plan that keeps everything."""
        whole = LayerPlan(tuple(range(geometry.num_kv_heads)), tuple(range(geometry.intermediate_size)))
        return cls(geometry, (whole,) * geometry.num_layers)

    @property
    def kv_counts(self) -> tuple[int, ...]:
        """Kept KV groups per layer."""
        return tuple(len(layer.kv_groups) for layer in self.layers)

    @property
    def channel_counts(self) -> tuple[int, ...]:
        """Kept MLP channels per layer."""
        return tuple(len(layer.channels) for layer in self.layers)

    @property
    def dense_counts(self) -> tuple[int, int]:
        """KV groups and channels of a layer that keeps everything."""
        return self.geometry.num_kv_heads, self.geometry.intermediate_size

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self.total_params == self.geometry.dense_params

    @property
    def total_params(self) -> int:
        """Parameters of the pruned model, tied embeddings counted once."""
        geometry = self.geometry
        kept = sum(self.kv_counts) * geometry.group_params + sum(self.channel_counts) * geometry.channel_params
        dropped = self.kv_counts.count(0) * geometry.attention_bias + self.channel_counts.count(0) * geometry.mlp_bias
        added = sum(self.attention_output_bias(i) and not geometry.attention_bias for i in range(len(self.layers)))
        added += sum(self.mlp_output_bias(i) and not geometry.mlp_bias for i in range(len(self.layers)))
        return geometry.fixed_params + kept + (added - dropped) * geometry.hidden_size

    def attention_output_bias(self, index: int) -> bool:
        """Whether o_proj of layer `index` has a bias."""
        return self._output_bias(self.kv_counts[index], self.geometry.num_kv_heads, self.geometry.attention_bias)

    def mlp_output_bias(self, index: int) -> bool:
        """Whether down_proj of layer `index` has a bias."""
        return self._output_bias(self.channel_counts[index], self.geometry.intermediate_size, self.geometry.mlp_bias)

    @property
    def adds_bias(self) -> bool:
        """Whether some output projection has a bias that the dense model has not."""
        attention, mlp = self.geometry.attention_bias, self.geometry.mlp_bias
        return any(self.attention_output_bias(i) > attention or self.mlp_output_bias(i) > mlp for i in range(len(self.layers)))

    def _output_bias(self, kept: int, units: int, dense: bool) -> bool:
        return kept > 0 and (dense or (self.output_bias and kept < units))

    @property
    def removed_params(self) -> int:
        """Parameters the plan removes from the dense model."""
        return self.geometry.dense_params - self.total_params

    def with_layer(self, index: int, layer: LayerPlan) -> PruningPlan:
        """The same plan with one layer replaced."""
        return replace(self, layers=self.layers[:index] + (layer,) + self.layers[index + 1 :])

    def to_json(self) -> str:
        """A JSON text that `from_json` reads back to an equal plan."""
        layers = [{"kv_groups": list(layer.kv_groups), "channels": list(layer.channels)} for layer in self.layers]
        return json.dumps({"geometry": asdict(self.geometry), "layers": layers, "output_bias": self.output_bias})

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan back. Raises UsageError on anything that is not one."""
        try:
            data = json.loads(text)
            layers = tuple(LayerPlan(tuple(row["kv_groups"]), tuple(row["channels"])) for row in data["layers"])
            return cls(Geometry(**data["geometry"]), layers, bool(data.get("output_bias", False)))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"not a pruning plan: {error}") from error


def expected_shapes(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama pruned to `plan`, a tied head left out."""
    geometry = plan.geometry
    hidden = geometry.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (geometry.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not geometry.tied_embeddings:
        shapes["lm_head.weight"] = (geometry.vocab_size, hidden)
    for index, (groups, width) in enumerate(zip(plan.kv_counts, plan.channel_counts, strict=True)):
        queries, keys = groups * geometry.group_width, groups * geometry.head_dim
        attention = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }
        mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        biased = {"o_proj": plan.attention_output_bias(index), "down_proj": plan.mlp_output_bias(index)}
        for kind, group, bias in (("self_attn", attention, geometry.attention_bias), ("mlp", mlp, geometry.mlp_bias)):
            for name, shape in group.items():
                if 0 in shape:  # the sublayer was removed
                    continue
                shapes[f"model.layers.{index}.{kind}.{name}.weight"] = shape
                if biased.get(name, bias):
                    shapes[f"model.layers.{index}.{kind}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{index}.{name}.weight"] = (hidden,)
    return shapes


def removed_prefixes(plan: PruningPlan) -> tuple[str, ...]:
    """How the names of the tensors begin that a model pruned to `plan` has not, because their sublayer was removed."""
    kinds = (("self_attn", plan.kv_counts), ("mlp", plan.channel_counts))
    return tuple(f"model.layers.{i}.{kind}." for kind, counts in kinds for i, count in enumerate(counts) if not count)


def _check_kept(layer: int, unit: str, kept: Iterable[int], size: int) -> None:
    kept = tuple(kept)
    if not kept:  # the whole sublayer is gone
        return
    if any(type(index) is not int for index in kept):
        raise UsageError(f"layer {layer}: {unit} indices must be integers")
    if any(b <= a for a, b in zip(kept, kept[1:], strict=False)) or kept[0] < 0 or kept[-1] >= size:
        raise UsageError(f"layer {layer}: {unit} indices must ascend within 0..{size - 1}")
