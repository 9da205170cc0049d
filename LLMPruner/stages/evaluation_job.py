"""What is asked of an evaluation: which models, what of them is measured, and all checks of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from LLMPruner import parallel
from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.data.corpora import check_corpus, local_file
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.compare import flag_of
from LLMPruner.evaluator.plots import check_plot
from LLMPruner.evaluator.results import read_results
from LLMPruner.evaluator.table import in_order
from LLMPruner.evaluator.tasks import TaskConfig, check_tasks
from LLMPruner.files import check_output_file
from LLMPruner.model.source import ModelSource, check_seq_len, files_at, find_model
from LLMPruner.stages import extras
from LLMPruner.stages.extras import Extras


@dataclass(frozen=True)
class EvaluationJob:
    """Which models, by name, and what of them is measured; None: that kind is not."""

    sources: Mapping[str, ModelSource]
    ppl: EvalConfig | None = EvalConfig()
    tasks: TaskConfig | None = None
    efficiency: EfficiencyConfig | None = None
    extras: Extras = Extras()
    common: CommonConfig = CommonConfig()
    baseline: str | None = None  # the others are compared to it; None: the original, else the first
    results: Path | None = None
    plot: Path | None = None
    resume: bool = False
    command: str = ""

    @property
    def dense(self) -> str:
        """The name of the model that the others are compared to."""
        return self.baseline or ("original" if "original" in self.sources else next(iter(self.sources)))

    @property
    def resident(self) -> bool:
        """Whether tasks or a prompt need the weights in memory."""
        return self.tasks is not None or self.extras.prompt is not None


def find_models(roles: Mapping[str, str], others: Sequence[str]) -> dict[str, ModelSource]:
    """Models by name, inspected: paths of the document's roles, and NAME=PATH.

    Raises UsageError for a name that is none or given twice, and for a path that is no model.
    """
    paths = dict(roles)
    for given in others:
        name, _, path = given.partition("=")
        if not (path and name and name == name.strip() and name.isprintable()):
            raise UsageError(f"--models takes NAME=PATH, got {given!r}")
        if name in paths:
            raise UsageError(f"two models are named {name}: give each a name of its own")
        paths[name] = path
    if not paths:
        raise UsageError("nothing to evaluate: give --original_model, --pruned_model, --finetuned_model or --models NAME=PATH")
    return {name: find_model(paths[name], flag_of(name)) for name in in_order(paths)}


def check(job: EvaluationJob) -> None:
    """Raise UsageError for what cannot be done, before torch is imported."""
    if job.ppl is None and job.tasks is None and job.efficiency is None and not job.extras.asked:
        raise UsageError("nothing to measure: --no_ppl needs --tasks, --efficiency, --generate or --engine")
    if job.dense not in job.sources:
        raise UsageError(f"--baseline {job.dense} is none of the models: {', '.join(job.sources)}")
    _check_outputs(job)
    for flag, asked in (("--efficiency", job.efficiency), ("--tasks", job.tasks), ("--generate", job.extras.prompt)):
        if asked is not None and job.common.stream == "on":
            raise UsageError(f"{flag} measures models in memory: run it without --stream on")
        if asked is not None and parallel.count() > 1:
            raise UsageError(f"{flag} measures one process: run it without the launcher")
    _check_lengths(job)
    extras.check(job.sources, job.extras)
    if job.tasks is not None:
        check_tasks(job.tasks)
    for name in job.ppl.datasets if job.ppl is not None else ():
        check_corpus(name, job.common.data_dir, "test", job.ppl.seq_len, job.common.text_format)


def _check_outputs(job: EvaluationJob) -> None:
    """Raise UsageError where what is to be written cannot be, or is one of the files that are read."""
    taken: dict[str, list[Path]] = {flag_of(name): files_at(source.path) for name, source in job.sources.items()}
    if job.ppl is not None:
        files = [local_file(name, job.common.data_dir, "test") for name in job.ppl.datasets]
        taken["--eval_datasets"] = [file for file in files if file is not None]
    if job.tasks is not None:
        taken["--tasks"] = job.tasks.files
    exports = extras.exports(job.sources, job.extras.engine)
    taken["--engine_exports"] = [file for path in exports.values() for file in files_at(path)]
    if job.results is not None:
        check_output_file(str(job.results), "--save_results", taken)
        taken["--save_results"] = [job.results]
        if job.resume and job.results.exists():
            read_results(job.results)
    elif job.resume:
        raise UsageError("--resume needs --save_results FILE: it has what was measured")
    if job.plot is not None:
        check_plot(str(job.plot), taken)
        if job.ppl is None and job.tasks is None and job.efficiency is None:
            raise UsageError("--plot draws PPL, tasks and --efficiency: ask for one of them, or leave --plot out")


def _check_lengths(job: EvaluationJob) -> None:
    """Raise UsageError where windows or prompts do not fit a model's positions."""
    for source in job.sources.values():
        if job.ppl is not None:
            check_seq_len(source, "--seq_len", job.ppl.seq_len)
        if job.efficiency is not None:
            check_seq_len(source, "--efficiency_prompt_tokens", job.efficiency.prompt_tokens)
            tokens = job.efficiency.decode_context + job.efficiency.new_tokens
            check_seq_len(source, "--efficiency_new_tokens (and what is in the cache before)", tokens)
    if job.ppl is not None and job.ppl.stride is not None and not 1 <= job.ppl.stride <= job.ppl.seq_len:
        raise UsageError(f"--stride must lie between 1 and --seq_len {job.ppl.seq_len}, got {job.ppl.stride}")
