"""Configuration of a Llama whose layers differ in width. Ships inside the exports; needs transformers only."""

import copy
import dataclasses

from transformers import LlamaConfig


class PrunedLlamaConfig(LlamaConfig):
    """A LlamaConfig with `per_layer_config`, `{"<layer>": {attribute: value}}`: what a layer has otherwise than the rest.

    The global values are the dense model's. `per_layer_config` is transformers' own from 5.14 on, before that a plain dict.
    """

    model_type = "pruned_llama"

    attention_output_bias: bool = False  # o_proj alone has a bias
    mlp_output_bias: bool = False  # down_proj alone has a bias
    removed_attention: list | None = None  # layers whose attention is there for the loaders only: one zeroed KV group
    removed_mlp: list | None = None  # layers whose MLP is a small one of zeros

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


if dataclasses.is_dataclass(LlamaConfig):  # transformers 5: collect the validators anew, with the one above
    from huggingface_hub.dataclasses import strict

    PrunedLlamaConfig = strict(PrunedLlamaConfig)
