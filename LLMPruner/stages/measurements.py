"""What an evaluation measures: PPL of corpora and tasks of one model at a time, and the speed of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.compare import flag_of, measure_costs, shared_windows
from LLMPruner.evaluator.results import Figure, Measurement, Subject
from LLMPruner.evaluator.task_index import version
from LLMPruner.evaluator.tasks import LoadedTask, TaskConfig, load_tasks, measure_task
from LLMPruner.model.source import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from LLMPruner.model.load import LoadedModel

Make = Callable[["LoadedModel", str], list[Figure]]  # measures a model, logged under its name
Sources, Tokenizers = Mapping[str, ModelSource], Mapping[str, "PreTrainedTokenizerBase"]


def ppl_measurements(
    sources: Sources, tokenizers: Tokenizers, config: EvalConfig, common: CommonConfig
) -> dict[Measurement, Make]:
    """PPL of each corpus, on windows that are cut now. Raises UsageError where two models read the text as other tokens."""
    from LLMPruner.data.windows import fingerprint
    from LLMPruner.evaluator import ppl

    config, split = replace(config, text_format=common.text_format), common.split("test")

    def make(name: str, rows: torch.Tensor) -> Make:
        def measured(loaded: LoadedModel, label: str) -> list[Figure]:
            (found,) = ppl.measure(loaded.runner, {name: rows}, label, split, config.stride)
            return [Figure("ppl", found.ppl, facts={"tokens": found.tokens})]

        return measured

    found = {}
    for name, rows in shared_windows(sources, tokenizers, config, common.data_dir).items():
        settings = {"split": split, "seq_len": config.seq_len, "stride": config.stride, "windows": len(rows)}
        found[Measurement("ppl", name, settings | {"text": fingerprint(rows)})] = make(name, rows)
    return found


def task_measurements(
    sources: Sources, tokenizers: Tokenizers, config: TaskConfig, common: CommonConfig
) -> dict[Measurement, Make]:
    """The tasks, whose examples are read now. Raises UsageError where a model lacks the chat template, or would be streamed."""
    for name, source in sources.items():
        check_resident("--tasks", name, source, common)
        if config.apply_chat_template and tokenizers[name].chat_template is None:
            raise UsageError(f"--apply_chat_template: {flag_of(name)} has no chat template, leave the flag out")

    def make(task: LoadedTask) -> Make:
        return lambda loaded, label: measure_task(loaded, task, config, label)

    asked = {"limit": config.limit, "num_fewshot": config.num_fewshot, "chat_template": config.apply_chat_template}
    asked |= {"batch_size": config.task_batch_size, "lm_eval": version()}
    return {
        Measurement("task", task.name, asked | {"text": task.fingerprint(config)}): make(task) for task in load_tasks(config)
    }


def check_resident(flag: str, name: str, source: ModelSource, common: CommonConfig) -> None:
    """Raise UsageError where a model would have to be streamed."""
    from LLMPruner.model.fit import streaming

    if streaming(source, common, Path()) is not None:
        raise UsageError(f"{flag} measures models in memory, and {flag_of(name)} does not fit: use a larger device")


def efficiency_measurement(subjects: Mapping[str, Subject], config: EfficiencyConfig, hardware: str) -> Measurement:
    """Size and speed of models side by side: on another machine, or beside others, it is another measurement."""
    beside = {name: subject.fingerprint for name, subject in subjects.items()}
    return Measurement("efficiency", "efficiency", asdict(config) | {"beside": beside, "hardware": hardware})


def measure_efficiency(
    sources: Sources, tokenizers: Tokenizers, config: EfficiencyConfig, common: CommonConfig
) -> dict[str, list[Figure]]:
    """The figures of every model, their repeats interleaved; the first one has them all among its facts, as they were."""
    found = {}
    for name, costs in measure_costs(sources, tokenizers, common, config).items():
        figures = [Figure(metric, value) for metric, value in _flat(costs)]
        found[name] = [replace(figures[0], facts={"details": costs}), *figures[1:]]
    return found


def efficiency_text(costs: Mapping[str, Mapping[str, Any]], config: EfficiencyConfig, common: CommonConfig) -> str:
    """The table of what was measured, now or before, with ratios to the first model and what bounds the rates."""
    from LLMPruner.evaluator.efficiency import Efficiency, efficiency_table
    from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype

    device = resolve_device(common.device)
    found = {name: Efficiency.of(values) for name, values in costs.items()}
    return efficiency_table(found, str(device), dtype_name(resolve_dtype(common.dtype, device)), config)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """All numbers of nested plain values, by their path: `decode_rates.1`."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, value))
    return found
