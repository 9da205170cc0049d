"""Structured, GQA-aware pruning of Llama models: one KV head goes with its query heads, channels go with their rows.

The public names load on first use (PEP 562), so that `import LLMPruner` costs nothing and arguments are checked before
torch is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Geometry": "plan",
    "LayerPlan": "plan",
    "PruningPlan": "plan",
    "PruneConfig": "config",
    "EvalConfig": "config",
    "FinetuneConfig": "training_config",
    "find_model": "model.source",
    "load_model": "model.load",
    "save_model": "model.load",
    "perplexity": "evaluator.ppl",
    "prune": "stages.prune",
    "recover": "stages.recover",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'LLMPruner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"LLMPruner.{_PUBLIC[name]}"), name)
