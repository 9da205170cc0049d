"""Exports: `import LLMPruner.export` lets transformers' Auto classes load a pruned directory without `trust_remote_code`."""

from __future__ import annotations

import sys

from LLMPruner.families.llama import FAMILIES


def register() -> None:
    """Make the classes of the `hf` exports known to transformers, which this imports."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from LLMPruner.export import configuration_pruned_llama as configs
    from LLMPruner.export import modeling_pruned_llama as models

    for name in (family.name for family in FAMILIES.values()):
        config = getattr(configs, f"Pruned{name}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(models, f"Pruned{name}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(models, f"Pruned{name}ForCausalLM"), exist_ok=True)


# Python says "-m" while it looks for the module to run: `python -m LLMPruner.export` answers --help and wrong flags without
# waiting for transformers, and registers before it reads a model.
if not (sys.argv[:1] == ["-m"] and "LLMPruner.export" in sys.orig_argv):
    register()
