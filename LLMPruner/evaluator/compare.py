"""What models that are compared share: windows that all read alike, and the minutes in which their speed is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from LLMPruner import parallel
from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.data.windows import evaluation_windows, read_alike
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.table import ROLES
from LLMPruner.model.load import load_model
from LLMPruner.model.source import ModelSource, check_token_ids, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


Value = TypeVar("Value")


def baseline_first(models: Mapping[str, Value], baseline: str) -> dict[str, Value]:
    """By name, in their order but for the one that the others are compared to."""
    return {baseline: models[baseline], **models}


def flag_of(name: str) -> str:
    """The flag that named a model: the document's for its roles."""
    return f"--{name}_model" if name in ROLES else f"--models {name}"


def shared_windows(
    sources: Mapping[str, ModelSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    evaluation: EvalConfig,
    data_dir: str | None,
) -> dict[str, torch.Tensor]:
    """Windows `(n, seq_len)` of every corpus, cut with the first model's tokenizer before any weight is read.

    Raises UsageError when another model reads the text as other tokens: its PPL per token is then another quantity.
    """
    first, tokenizer = next(iter(tokenizers.items()))
    windows = evaluation_windows(tokenizer, evaluation, data_dir)
    parallel.check_shares(*windows.values())
    for name, other in tokenizers.items():
        if len(other) != len(tokenizer) or not read_alike(tokenizer, other, evaluation, data_dir):
            raise UsageError(f"the tokenizers of {flag_of(first)} and {flag_of(name)} differ: their PPL cannot be compared")
        check_token_ids(sources[name], flag_of(name), *windows.values())
    return windows


def measure_costs(
    sources: Mapping[str, ModelSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    common: CommonConfig,
    config: EfficiencyConfig,
) -> dict[str, Any]:
    """Size and speed of all models side by side, as plain values. All are in memory together, so that repeats interleave."""
    from LLMPruner.evaluator.efficiency import measure_efficiency

    models = {
        role: load_model(source, dtype=common.dtype, device=common.device, tokenizer=tokenizers[role])
        for role, source in sources.items()
    }
    measured = measure_efficiency(models, {role: weight_files(source) for role, source in sources.items()}, config)
    return {role: result.as_dict() for role, result in measured.items()}
