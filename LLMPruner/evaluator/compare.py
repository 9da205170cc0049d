"""Several models over the same windows: PPL of one after the other, size and speed side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import LLMPruner
from LLMPruner import parallel
from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.data.windows import evaluation_windows, read_alike
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.table import comparison_table, results_json, tables_of
from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype
from LLMPruner.model.load import load_model, load_tokenizer, opened
from LLMPruner.model.source import ModelSource, check_token_ids
from LLMPruner.run import versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from LLMPruner.evaluator.ppl import Perplexity


def compare(
    sources: Mapping[str, ModelSource],
    evaluation: EvalConfig,
    common: CommonConfig,
    efficiency: EfficiencyConfig | None = None,
    lang: str = "zh",
) -> dict[str, Any]:
    """Measure every model, by role, and print the tables; returns the record that `--save_results` writes."""
    evaluation = replace(evaluation, text_format=common.text_format)
    device = resolve_device(common.device)
    tokenizers = {role: load_tokenizer(source) for role, source in sources.items()}
    windows = shared_windows(sources, tokenizers, evaluation, common.data_dir)
    results = {role: measure_model(source, tokenizers[role], windows, role, common) for role, source in sources.items()}
    parameters = {role: source.plan.total_params for role, source in sources.items()}
    if parallel.main():
        print(comparison_table(tables_of(results, parameters), lang))
    costs = measure_costs(sources, tokenizers, common, efficiency) if efficiency is not None else {}
    environment = {
        "seq_len": evaluation.seq_len,
        "samples": evaluation.samples,
        "text_format": evaluation.text_format,
        "windows": {name: len(rows) for name, rows in windows.items()},
        "device": str(device),
        "dtype": dtype_name(resolve_dtype(common.dtype, device)),
        "versions": {"LLMPruner": LLMPruner.__version__, **versions()},
        **({"efficiency": costs} if costs else {}),
    }
    paths = {role: os.fspath(source.path) for role, source in sources.items()}
    return results_json(results, parameters, paths, **environment)


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
    for role, other in tokenizers.items():
        if len(other) != len(tokenizer) or not read_alike(tokenizer, other, evaluation, data_dir):
            raise UsageError(f"the tokenizers of --{first}_model and --{role}_model differ: their PPL cannot be compared")
        check_token_ids(sources[role], f"--{role}_model", *windows.values())
    return windows


def measure_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    windows: dict[str, torch.Tensor],
    role: str,
    common: CommonConfig,
) -> list[Perplexity]:
    """PPL of one model on every corpus; the model is gone from memory afterwards."""
    from LLMPruner.evaluator.ppl import measure

    with opened(source, common, tokenizer) as loaded:
        return measure(loaded.runner, windows, role, common.split("test"))


def measure_costs(
    sources: Mapping[str, ModelSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    common: CommonConfig,
    config: EfficiencyConfig,
) -> dict[str, Any]:
    """Size and speed of all models side by side; prints the table. All are in memory together, so that repeats interleave."""
    from LLMPruner.evaluator.efficiency import efficiency_table, measure_efficiency

    models = {
        role: load_model(source, dtype=common.dtype, device=common.device, tokenizer=tokenizers[role])
        for role, source in sources.items()
    }
    measured = measure_efficiency(models, {role: source.path for role, source in sources.items()}, config)
    model = next(iter(models.values())).model
    print(efficiency_table(measured, str(model.device), dtype_name(model.dtype), config))
    return {role: result.as_dict() for role, result in measured.items()}
