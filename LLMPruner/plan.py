"""The pruning plan: which KV groups and MLP channels every layer keeps, in integers.

The plan is decided once (importance, allocation) and read by everything downstream: slicing, repair, checkpoint, plots,
diagnosis. No torch here, so that a plan can be checked before anything heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from LLMPruner.errors import UsageError
from LLMPruner.families.family import Family, Projection, Sublayer
from LLMPruner.families.llama import FAMILIES, family_of


@dataclass(frozen=True)
class Geometry:
    """The sizes of a dense model, read from its config; parameter counts follow from them and from its family's table."""

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
    family: str = "llama"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UsageError(f"no table of the family {self.family!r}: there are {', '.join(FAMILIES)}")
        for name, value in ((entry.name, getattr(self, entry.name)) for entry in fields(self) if entry.type == "int"):
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"the model config is not a usable Llama: {name} is {value!r}")
        if self.num_heads % self.num_kv_heads:
            heads = f"{self.num_heads} query heads do not divide into {self.num_kv_heads} KV heads"
            raise UsageError(f"the model config is not a usable Llama: {heads}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Read a `config.json` (as a dict; without `model_type` a Llama's). Raises UsageError where a size is missing."""
        family = family_of(config.get("model_type", "llama"))
        if family is None:
            raise UsageError(f"model_type {config.get('model_type')!r} is of no family in families/: {', '.join(FAMILIES)}")
        config = {**family.defaults, **config}
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
                max_positions=family.positions(config) or cls.max_positions,
                family=family.model_type,
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UsageError(f"the model config is not a usable Llama: {error} is missing or wrong") from error

    @property
    def table(self) -> Family:
        """What the model's layers are made of."""
        return FAMILIES[self.family]

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head: 4 on Llama-3, 3 on SmolLM2, 1 for multi-head attention."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_width(self) -> int:
        """Columns of o_proj (rows of q_proj) that belong to one KV group."""
        return self.q_per_kv * self.head_dim

    channel_width = 1  # rows of gate and up, columns of down, of one channel

    def segment(self, projection: Projection) -> int:
        """Adjacent rows (of an output projection: columns) that one unit owns."""
        return getattr(self, projection.segment)

    def has_bias(self, projection: Projection) -> bool:
        """Whether the dense model's projection has a bias."""
        return projection.bias if isinstance(projection.bias, bool) else getattr(self, projection.bias)

    def units(self, sublayer: str) -> int:
        """Units of a dense sublayer: KV groups of the attention, channels of the MLP."""
        return getattr(self, self.table.sublayer(sublayer).units)

    def unit_params(self, sublayer: str) -> int:
        """Parameters of one unit: its rows of the inputs' weights and biases, and its columns of the output."""
        parts = self.table.sublayer(sublayer)
        rows = sum(self.segment(part) * (self.hidden_size + self.has_bias(part)) for part in parts.inputs)
        return rows + self.segment(parts.output) * self.hidden_size

    def sublayer_params(self, sublayer: str) -> int:
        """Prunable parameters of one dense sublayer."""
        return self.units(sublayer) * self.unit_params(sublayer)

    def whole_params(self, sublayer: str) -> int:
        """Parameters inside a sublayer that go only with the whole of it: what its units share, and its output's bias."""
        parts = self.table.sublayer(sublayer)
        return sum(getattr(self, part.width) for part in parts.whole) + self.hidden_size * self.has_bias(parts.output)

    @property
    def fixed_params(self) -> int:
        """Parameters that no unit owns: embeddings, head, norms, and what a sublayer's units share."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        norms = self.hidden_size * sum(1 + len(sublayer.wraps) for sublayer in self.table.sublayers)
        shared = sum(self.whole_params(sublayer.name) for sublayer in self.table.sublayers)
        return embeddings + self.num_layers * (norms + shared) + self.hidden_size

    @property
    def dense_params(self) -> int:
        """Parameters of the dense model, tied embeddings counted once."""
        return self.fixed_params + self.num_layers * sum(self.sublayer_params(part.name) for part in self.table.sublayers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the family is named only where it is not Llama, as in files of before there were others."""
        values = asdict(self)
        if self.family == "llama":
            del values["family"]
        return values


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: KV groups and MLP channels, as ascending indices into the dense layer. None: no such sublayer."""

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]

    def kept(self, sublayer: str) -> tuple[int, ...]:
        """The kept units of the attention or the MLP."""
        return {"attention": self.kv_groups, "mlp": self.channels}[sublayer]


@dataclass(frozen=True)
class PruningPlan:
    """For every layer the kept units. Immutable; checks itself. `output_bias`: pruned sublayers have one at their output."""

    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    output_bias: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != self.geometry.num_layers:
            raise UsageError(f"the plan has {len(self.layers)} layers, the model has {self.geometry.num_layers}")
        for (index, layer), sublayer in product(enumerate(self.layers), self.geometry.table.sublayers):
            _check_kept(index, sublayer.unit, layer.kept(sublayer.name), self.geometry.units(sublayer.name))
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
        return self.counts("attention")

    @property
    def channel_counts(self) -> tuple[int, ...]:
        """Kept MLP channels per layer."""
        return self.counts("mlp")

    def counts(self, sublayer: str) -> tuple[int, ...]:
        """Kept units of the attention or the MLP per layer."""
        return tuple(len(layer.kept(sublayer)) for layer in self.layers)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return self.total_params == self.geometry.dense_params

    @property
    def total_params(self) -> int:
        """Parameters of the pruned model, tied embeddings counted once."""
        geometry, total = self.geometry, self.geometry.fixed_params
        for sublayer in geometry.table.sublayers:
            counts = self.counts(sublayer.name)
            total += sum(counts) * geometry.unit_params(sublayer.name)
            total -= counts.count(0) * geometry.whole_params(sublayer.name)
            total += self._added_biases(sublayer) * geometry.hidden_size
        return total

    def has_output_bias(self, sublayer: str, index: int) -> bool:
        """Whether the sublayer's output projection in layer `index` has a bias."""
        kept, geometry = len(self.layers[index].kept(sublayer)), self.geometry
        dense = geometry.has_bias(geometry.table.sublayer(sublayer).output)
        return kept > 0 and (dense or (self.output_bias and kept < geometry.units(sublayer)))

    @property
    def adds_bias(self) -> bool:
        """Whether some output projection has a bias that the dense model has not."""
        return any(self._added_biases(sublayer) for sublayer in self.geometry.table.sublayers)

    def _added_biases(self, sublayer: Sublayer) -> int:
        """Layers whose output projection has a bias that the dense model has not."""
        if not self.output_bias or self.geometry.has_bias(sublayer.output):
            return 0
        return sum(self.has_output_bias(sublayer.name, index) for index in range(len(self.layers)))

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
        return json.dumps({"geometry": self.geometry.as_dict(), "layers": layers, "output_bias": self.output_bias})

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
    """Name and shape of every tensor of a model pruned to `plan`, a tied head left out."""
    geometry, table = plan.geometry, plan.geometry.table
    hidden = geometry.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{table.embedding}.weight": (geometry.vocab_size, hidden),
        f"{table.norm}.weight": (hidden,),
    }
    if not geometry.tied_embeddings:
        shapes[f"{table.head}.weight"] = (geometry.vocab_size, hidden)
    for index in range(geometry.num_layers):
        layer = f"{table.layers}.{index}"
        for sublayer in table.sublayers:
            if plan.layers[index].kept(sublayer.name):  # else the sublayer was removed
                shapes |= {f"{layer}.{sublayer.attribute}.{name}": size for name, size in _inner_shapes(plan, sublayer, index)}
        for sublayer in table.sublayers:
            shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in (sublayer.norm, *sublayer.wraps)}
    return shapes


def _inner_shapes(plan: PruningPlan, sublayer: Sublayer, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names, within the sublayer, and shapes of the tensors that layer `index` has."""
    geometry, units = plan.geometry, len(plan.layers[index].kept(sublayer.name))
    for part in sublayer.inputs:
        rows = units * geometry.segment(part)
        yield f"{part.name}.weight", (rows, geometry.hidden_size)
        if geometry.has_bias(part):
            yield f"{part.name}.bias", (rows,)
    output = sublayer.output
    yield f"{output.name}.weight", (geometry.hidden_size, units * geometry.segment(output))
    if plan.has_output_bias(sublayer.name, index):
        yield f"{output.name}.bias", (geometry.hidden_size,)
    for part in sublayer.whole:
        yield f"{part.name}.weight", (getattr(geometry, part.width),)


def removed_prefixes(plan: PruningPlan) -> tuple[str, ...]:
    """How the names of the tensors begin that a model pruned to `plan` has not, because their sublayer was removed."""
    table = plan.geometry.table
    return tuple(
        f"{table.layers}.{index}.{sublayer.attribute}."
        for sublayer in table.sublayers
        for index, count in enumerate(plan.counts(sublayer.name))
        if not count
    )


def _check_kept(layer: int, unit: str, kept: Iterable[int], size: int) -> None:
    kept = tuple(kept)
    if not kept:  # the whole sublayer is gone
        return
    if any(type(index) is not int for index in kept):
        raise UsageError(f"layer {layer}: {unit} indices must be integers")
    if any(b <= a for a, b in zip(kept, kept[1:], strict=False)) or kept[0] < 0 or kept[-1] >= size:
        raise UsageError(f"layer {layer}: {unit} indices must ascend within 0..{size - 1}")
