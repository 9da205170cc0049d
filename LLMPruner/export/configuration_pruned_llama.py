"""Configurations of Llama-like models whose layers differ in width. Ships inside the exports; needs transformers only."""

import copy
import dataclasses
from typing import Optional

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class _PerLayer:
    """A family's config with `per_layer_config`, `{"<layer>": {attribute: value}}`: what a layer has otherwise than the rest.

    The global values are the dense model's. `per_layer_config` is transformers' own from 5.14 on, before that a plain dict.
    """

    def layer(self, index):
        """The configuration of one layer."""
        if hasattr(type(self), "per_layer_config"):
            return self.per_layer_config[index]
        merged = copy.copy(self)
        for name, value in (getattr(self, "per_layer_config", None) or {}).get(str(index), {}).items():
            setattr(merged, name, value)
        return merged

    def validate_architecture(self):
        """No global check: hidden_size need not be a multiple of a pruned layer's heads, whose head_dim is explicit."""


def _pruned(family, base):
    """The configuration class of a family, `PrunedLlamaConfig` for Llama."""
    fields = {
        "attention_output_bias": (bool, False),  # o_proj alone has a bias
        "mlp_output_bias": (bool, False),  # down_proj alone has a bias
        # layers whose attention (one zeroed KV group) or MLP (a few zeroed channels) is there for the loaders only
        "removed_attention": (Optional[list], None),  # noqa: UP045 (Python 3.9)
        "removed_mlp": (Optional[list], None),  # noqa: UP045
    }
    body = {
        "__module__": __name__,
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        **{name: value for name, (_, value) in fields.items()},
        "model_type": f"pruned_{base.model_type}",
    }
    made = type(f"Pruned{family}Config", (_PerLayer, base), body)
    if dataclasses.is_dataclass(base):  # transformers 5: collect the validators anew, with the one above
        from huggingface_hub.dataclasses import strict

        made = strict(made)
    return made


PrunedLlamaConfig = _pruned("Llama", LlamaConfig)
PrunedMistralConfig = _pruned("Mistral", MistralConfig)
PrunedQwen2Config = _pruned("Qwen2", Qwen2Config)
PrunedQwen3Config = _pruned("Qwen3", Qwen3Config)
