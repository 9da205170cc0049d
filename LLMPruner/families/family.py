"""What a decoder layer is made of: the table that slicing, counting, exports, LoRA and diagnosis read. No torch, no sizes.

A family that differs in data (which projections have biases, which norms stand where) is one more table in `llama.py`, and
no more code. Sizes are named, not stated: `segment` and the like are names of attributes of `plan.Geometry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Projection:
    """One Linear of a sublayer, of whose rows (or, of an output projection, columns) each unit owns adjacent ones."""

    name: str
    segment: str  # how many rows or columns a unit owns: an attribute of Geometry
    bias: str | bool = False  # whether it has one: the same for the whole family, or an attribute of Geometry
    rotary: bool = False  # whether its rows are rotated by position, so that an order of rotation is part of the format


@dataclass(frozen=True)
class Whole:
    """A tensor inside a sublayer that all units share, so that it stays whole: Qwen3's norm of each query head, for example."""

    name: str
    width: str  # an attribute of Geometry


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of a decoder layer: units that own rows of `inputs` and columns of `output`."""

    name: str  # attention or mlp
    attribute: str  # of the decoder layer
    norm: str  # of the decoder layer: what the sublayer reads the residual stream through
    unit: str  # what messages call a unit
    units: str  # how many the dense sublayer has: an attribute of Geometry
    inputs: tuple[Projection, ...]
    output: Projection
    whole: tuple[Whole, ...] = ()
    wraps: tuple[str, ...] = ()  # norms of the decoder layer that the output passes before it joins the residual stream
    states_units: str | None = None  # attribute of the module that repeats the number of its units

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All Linears, the output last."""
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class Family:
    """The layers of one `model_type`, and where the modules around them are."""

    model_type: str
    name: str  # as transformers' classes spell it
    attention: Sublayer
    mlp: Sublayer
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what transformers takes where a config is silent
    states_head_dim: bool = True  # whether loaders read head_dim from the config, so that heads need not divide the width
    slides: tuple[str, ...] = ()  # config keys that, all set, make attention slide in a window; the last one is its width
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def pruned_type(self) -> str:
        """The model_type of the hf export, whose layers differ in width."""
        return f"pruned_{self.model_type}"

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """In the order in which the residual stream passes them."""
        return self.attention, self.mlp

    def sublayer(self, name: str) -> Sublayer:
        """The attention or the MLP. Raises KeyError for another name."""
        return {sublayer.name: sublayer for sublayer in self.sublayers}[name]

    def positions(self, config: Mapping[str, Any]) -> int | None:
        """As many tokens as attend to all before them: the positions, no more than the window's; None where none are stated."""
        return min(filter(None, (config.get("max_position_embeddings"), self.window(config))), default=None)

    def window(self, config: Mapping[str, Any]) -> int | None:
        """The width of the window that attention slides in by a `config.json`; None where every token sees all before it."""
        values = [config.get(key, self.defaults.get(key)) for key in self.slides]
        return values[-1] if values and all(values) else None


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings from a config of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling), as 5 words them."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        scaling = dict(config.get("rope_scaling") or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))  # the older word
        parameters = scaling
    return {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0), **parameters}
