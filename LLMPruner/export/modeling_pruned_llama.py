"""A Llama whose layers differ in KV groups and MLP channels. Ships inside the exports; needs torch and transformers only.

Every module is transformers' own, built from its layer's configuration; no forward pass is overridden.
"""

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_pruned_llama import PrunedLlamaConfig


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder layer of its own widths."""

    def __init__(self, config, layer_idx):
        layer = config.layer(layer_idx)
        super().__init__(layer, layer_idx)
        self.self_attn.config = config  # so that set_attn_implementation reaches every layer
        for projection, name, bias in (
            (self.self_attn, "o_proj", layer.attention_output_bias),
            (self.mlp, "down_proj", layer.mlp_output_bias),
        ):
            linear = getattr(projection, name)
            if bias and linear.bias is None:
                setattr(projection, name, nn.Linear(linear.in_features, linear.out_features, bias=True))


class PrunedLlamaModel(LlamaModel):
    """The decoder."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel's own would build layers of one width
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([PrunedLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """The decoder with its language-model head."""

    config_class = PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
