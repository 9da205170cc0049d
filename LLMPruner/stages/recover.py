"""The stages of recovery in order: load, measure, train, save, measure again."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.config import FinetuneConfig
from LLMPruner.data.mixture import as_typed, mixture
from LLMPruner.data.windows import evaluation_windows, training_windows
from LLMPruner.model.load import load_model, load_tokenizer
from LLMPruner.model.source import check_token_ids
from LLMPruner.run import versions
from LLMPruner.stages import steps
from LLMPruner.stages.job import FINETUNED_FILE, MODEL_FILE, RecoverJob, check_exports

if TYPE_CHECKING:
    import torch

    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run

logger = logging.getLogger("LLMPruner")


def recover(job: RecoverJob, run: Run) -> LoadedModel:
    """Run all stages of `job` into the folder of `run`; returns the fine-tuned model."""
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        windows = training_windows(tokenizer, job.training, job.common)
        tested = evaluation_windows(tokenizer, job.evaluation, job.common.data_dir) if job.measures else {}
        check_token_ids(job.source, "--model_path", windows, *tested.values())
        check_exports(job.source, tokenizer, job.export)
        loaded = load_model(job.source, dtype=job.common.dtype, device=job.common.device, tokenizer=tokenizer)
    # An experiment that was pruned under the same name keeps the description and the metrics of its pruning.
    suffix = "_finetune" if (run.dir / MODEL_FILE).exists() else ""
    settings = {"model_path": job.source.path, **asdict(job.common), **asdict(job.training)}
    run.describe(settings, f"description{suffix}.txt")
    results: dict[str, list[Perplexity]] = {}
    if job.test_before:
        results["before"] = steps.measure(run, loaded, tested, "before fine-tuning", job.common.split("test"))
    base, seed = job.source.path, job.common.seed
    run.metrics["training"] = train_and_save(loaded, job.training, windows, run, seed=seed, save=job.save, base=base)
    if job.test_after:
        results["after"] = steps.measure(run, loaded, tested, "after fine-tuning", job.common.split("test"))
    run.metrics["ppl"] = {when: [result.as_dict() for result in measured] for when, measured in results.items()}
    run.save_metrics(f"metrics{suffix}.json")
    for before, after in zip(results.get("before", ()), results.get("after", ()), strict=False):
        logger.info("PPL %s %s: %.4f -> %.4f", before.corpus, before.split, before.ppl, after.ppl)
    steps.export(run, loaded, job.export, f"metrics{suffix}.json")
    return loaded


def train_and_save(
    loaded: LoadedModel, config: FinetuneConfig, windows: torch.Tensor, run: Run, *, seed: int, save: bool, base: Path
) -> dict[str, Any]:
    """Fine-tune `loaded` in place and write `pytorch_model_finetuned.bin` (and LoRA's `adapter/`) into the run's folder.

    `base` is the checkpoint that the weights come from, for the record. Returns the training record of `finetune`. Raises
    RunError, with nothing written, when the loss or its gradient is not finite.
    """
    from LLMPruner.trainer.finetuner import finetune

    adapter_dir = run.dir / "adapter" if save and config.method == "lora" else None
    with run.stage("train") as record:
        record |= finetune(loaded, config, windows, seed=seed, adapter_dir=adapter_dir, base=base)
    loaded.provenance["finetune"] = _provenance(config, record["warmup_steps"], len(windows), seed, base, run.command)
    if save:
        steps.save(run, loaded, FINETUNED_FILE)
    return record


def _provenance(config: FinetuneConfig, warmup_steps: int, windows: int, seed: int, base: Path, command: str) -> dict[str, Any]:
    import peft

    settings = {name: value for name, value in asdict(config).items() if name not in ("prefix", "dataset", "lora")}
    if config.method == "lora":
        settings["lora"] = asdict(config.lora)
    return settings | {
        "lr": config.learning_rate,
        "warmup_steps": warmup_steps,
        "corpus": as_typed(config),
        "parts": {part.name: part.weight for part in mixture(config)},
        "split": "train",
        "windows": windows,
        "seed": seed,
        "base_checkpoint": str(base),
        "command": command,
        "versions": versions() | {"peft": peft.__version__},
    }
