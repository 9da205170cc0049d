"""Exports: `import LLMPruner.export` lets transformers' Auto classes load a pruned directory without `trust_remote_code`."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from LLMPruner.export.configuration_pruned_llama import PrunedLlamaConfig
from LLMPruner.export.modeling_pruned_llama import PrunedLlamaForCausalLM, PrunedLlamaModel

AutoConfig.register(PrunedLlamaConfig.model_type, PrunedLlamaConfig, exist_ok=True)
AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM, exist_ok=True)
