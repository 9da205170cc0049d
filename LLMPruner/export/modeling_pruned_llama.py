"""Llama-like models whose layers differ in KV groups and MLP channels. Ships inside the exports; needs torch and transformers.

Every module is transformers' own, built from its layer's configuration; no forward pass is overridden.
"""

import copy

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .configuration_pruned_llama import PrunedLlamaConfig, PrunedMistralConfig, PrunedQwen2Config, PrunedQwen3Config


def _layer_class(layer_class):
    class Layer(layer_class):
        """A decoder layer of its own widths."""

        def __init__(self, config, layer_idx):
            layer = config.layer(layer_idx)
            super().__init__(layer, layer_idx)
            self.self_attn.config = config  # so that set_attn_implementation reaches every layer
            for module, name, bias in (
                (self.self_attn, "o_proj", layer.attention_output_bias),
                (self.mlp, "down_proj", layer.mlp_output_bias),
            ):
                linear = getattr(module, name)
                if bias and linear.bias is None:
                    setattr(module, name, nn.Linear(linear.in_features, linear.out_features, bias=True))

    return Layer


def _model_class(model_class, layer_class):
    class Model(model_class):
        """The decoder."""

        def __init__(self, config):
            without_layers = copy.copy(config)
            without_layers.num_hidden_layers = 0
            super().__init__(without_layers)  # everything but the layers, which would all be of one width
            self.config = config
            self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
            self.post_init()

    return Model


def _causal_class(causal_class, base, model_class):
    class CausalLM(causal_class):
        """The decoder with its language-model head."""

        def __init__(self, config):
            base.__init__(self, config)
            self.model = model_class(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    return CausalLM


def _pruned(family, stock, config_class):
    """The decoder and the language model of a family, `PrunedLlamaModel` and `PrunedLlamaForCausalLM` for Llama."""
    layer = _layer_class(getattr(stock, f"{family}DecoderLayer"))
    model = _model_class(getattr(stock, f"{family}Model"), layer)
    causal = _causal_class(getattr(stock, f"{family}ForCausalLM"), getattr(stock, f"{family}PreTrainedModel"), model)
    for made, name in ((layer, "DecoderLayer"), (model, "Model"), (causal, "ForCausalLM")):
        made.__name__ = made.__qualname__ = f"Pruned{family}{name}"
        made.config_class, made._no_split_modules = config_class, [f"Pruned{family}DecoderLayer"]
    return model, causal


PrunedLlamaModel, PrunedLlamaForCausalLM = _pruned("Llama", modeling_llama, PrunedLlamaConfig)
PrunedMistralModel, PrunedMistralForCausalLM = _pruned("Mistral", modeling_mistral, PrunedMistralConfig)
PrunedQwen2Model, PrunedQwen2ForCausalLM = _pruned("Qwen2", modeling_qwen2, PrunedQwen2Config)
PrunedQwen3Model, PrunedQwen3ForCausalLM = _pruned("Qwen3", modeling_qwen3, PrunedQwen3Config)
