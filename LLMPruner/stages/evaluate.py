"""Any number of models by any number of measurements: what was asked, all checks of it, and the order of work.

Windows are cut and tasks read before the first weight. Then model by model, each loaded once and only where something of it
is missing; every figure is in the results file before the next one is measured. Speed comes last, of all models together.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.data.corpora import check_corpus
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.compare import flag_of
from LLMPruner.evaluator.overview import FORMATS, Overview, as_text, overview
from LLMPruner.evaluator.results import Figure, Measurement, Record, Results, Subject, read_results
from LLMPruner.evaluator.table import ROLES, comparison_table, in_order, results_json, tables_of
from LLMPruner.evaluator.tasks import TaskConfig, check_tasks
from LLMPruner.files import check_output_file
from LLMPruner.model.source import ModelSource, check_seq_len, find_model
from LLMPruner.stages import extras
from LLMPruner.stages.extras import Extras
from LLMPruner.stages.measurements import (
    Make,
    Tokenizers,
    efficiency_measurement,
    measure_efficiency,
    ppl_measurements,
    task_measurements,
)
from LLMPruner.stages.subjects import provenance, subject_of

if TYPE_CHECKING:
    from LLMPruner.evaluator.engines import EngineTimes
    from LLMPruner.evaluator.ppl import Perplexity

logger = logging.getLogger("LLMPruner")


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
    if job.results is not None:
        check_output_file(str(job.results), "--save_results")
        if job.resume and job.results.exists():
            read_results(job.results)
    elif job.resume:
        raise UsageError("--resume needs --save_results FILE: it has what was measured")
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


class Evaluation:
    """What is known of a job's models, measured now or before."""

    def __init__(
        self, job: EvaluationJob, subjects: Mapping[str, Subject], results: Results, asked: Sequence[Measurement]
    ) -> None:
        self.job, self.subjects, self.results, self.asked = job, subjects, results, asked
        self.told: set[str] = set()  # kinds whose tables were printed as they were measured
        self.times: EngineTimes | None = None  # in the engine

    def missing(self, name: str) -> list[Measurement]:
        """What is still to be measured of a model."""
        return [measurement for measurement in self.asked if not self.results.of(self.subjects[name], measurement)]

    def keep(self, name: str, measurement: Measurement, figures: Sequence[Figure], seconds: float) -> None:
        """Take what was measured, and write it down."""
        self.results.add(self.subjects[name], measurement, figures, seconds)
        self.save()

    def save(self) -> None:
        """Write the results file, where there is to be one."""
        self.results.save(self.view)

    def records_of(self, name: str) -> list[Record]:
        """The records of a model, in the order in which they were asked for."""
        return [record for measurement in self.asked for record in self.results.of(self.subjects[name], measurement)]

    @property
    def records(self) -> list[Record]:
        """Those of all models."""
        return [record for name in self.subjects for record in self.records_of(name)]

    @property
    def parameters(self) -> dict[str, int]:
        """Of every model."""
        return {name: subject.parameters for name, subject in self.subjects.items()}

    @property
    def perplexities(self) -> dict[str, list[Perplexity]]:
        """The PPLs of every model of which something is known."""
        known = {name: self.records_of(name) for name in self.subjects}
        return {name: [_perplexity(r) for r in records if r["kind"] == "ppl"] for name, records in known.items() if records}

    @property
    def view(self) -> dict[str, Any]:
        """What the results file says of this job's models beside the records."""
        from LLMPruner.model.device import resolve_device

        job, config = self.job, self.job.ppl
        said: dict[str, Any] = {}
        if config is not None:
            windows = {measured.name: measured.settings["windows"] for measured in self.asked if measured.kind == "ppl"}
            said = {"seq_len": config.seq_len, "stride": config.stride, "samples": config.samples, "windows": windows}
        said |= {"text_format": job.common.text_format, "device": str(resolve_device(job.common.device))}
        said |= {name: self.results.run[name] for name in ("dtype", "versions")}
        costs = {record["model"]: record["details"] for record in self.records if "details" in record}
        said |= {"efficiency": costs} if costs else {}
        said |= extras.view(job.extras, self.records, self.times)
        paths = {name: subject.path for name, subject in self.subjects.items()}
        return results_json(self.perplexities, self.parameters, paths, **said)


def _perplexity(record: Record) -> Perplexity:
    from LLMPruner.evaluator.ppl import Perplexity

    names = ("split", "seq_len", "windows", "stride")
    settings = {name: record["settings"][name] for name in names}
    return Perplexity(record["name"], tokens=record["tokens"], ppl=record["value"], **settings)


def evaluate(job: EvaluationJob) -> Evaluation:
    """Measure what the results file has not, and keep it there. Raises UsageError for what only texts and tokenizers tell."""
    from LLMPruner.model.load import load_tokenizer

    run, measures = provenance(job.common, job.command), {}
    tokenizers = {name: load_tokenizer(source) for name, source in job.sources.items()}
    if job.ppl is not None:
        measures |= ppl_measurements(job.sources, tokenizers, job.ppl, job.common)
    if job.tasks is not None:
        measures |= task_measurements(job.sources, tokenizers, job.tasks, job.common)
    measures |= extras.generation_measurement(job.sources, tokenizers, job.extras.generate, job.common)
    subjects = {name: subject_of(name, source) for name, source in job.sources.items()}
    results = Results.opened(job.results, run, resume=job.resume)
    evaluation = Evaluation(job, subjects, results, list(measures))
    for name in subjects:
        _measure_model(job, evaluation, name, measures, tokenizers)
    if job.efficiency is not None:
        evaluation.asked.append(efficiency_measurement(subjects, job.efficiency, results.run["hardware"]))
        _measure_together(job, evaluation, tokenizers)
    if job.extras.engine.engine is not None:
        _time_exports(job, evaluation)
    evaluation.save()
    return evaluation


def _measure_model(
    job: EvaluationJob, evaluation: Evaluation, name: str, measures: Mapping[Measurement, Make], tokenizers: Tokenizers
) -> None:
    """What is missing of one model, which is gone from memory afterwards."""
    from LLMPruner.model.load import opened

    missing = evaluation.missing(name)
    if not missing:
        if evaluation.asked:
            logger.info("%s: all was measured before", name)
        return
    # `check_resident` has seen that it fits
    common = replace(job.common, stream="off") if job.resident else job.common
    with opened(job.sources[name], common, tokenizers[name]) as loaded:
        for measurement in missing:
            start = time.perf_counter()
            figures = measures[measurement](loaded, name)
            evaluation.keep(name, measurement, figures, time.perf_counter() - start)


def _measure_together(job: EvaluationJob, evaluation: Evaluation, tokenizers: Tokenizers) -> None:
    """Size and speed of all models, whose repeats interleave: all anew where one is missing."""
    measurement = evaluation.asked[-1]
    if all(evaluation.results.of(subject, measurement) for subject in evaluation.subjects.values()):
        logger.info("efficiency: all was measured before")
        return
    start = time.perf_counter()
    for name, figures in measure_efficiency(job.sources, tokenizers, job.efficiency, job.common).items():
        evaluation.keep(name, measurement, figures, time.perf_counter() - start)
    evaluation.told.add("efficiency")


def _time_exports(job: EvaluationJob, evaluation: Evaluation) -> None:
    """Speed of all models in their engine, always anew."""
    start = time.perf_counter()
    evaluation.times = extras.time_exports(job.sources, job.extras, job.common, job.dense)
    hardware = evaluation.results.run["hardware"]
    measurement, figures = extras.engine_records(evaluation.times, job.sources, job.extras, hardware)
    for name in evaluation.subjects:
        evaluation.keep(name, measurement, figures[name], time.perf_counter() - start)


def overview_of(evaluation: Evaluation, lang: str) -> Overview:
    """The general table of all models."""
    return overview(evaluation.records, list(evaluation.subjects), evaluation.job.dense, lang)


def report(evaluation: Evaluation, form: str, lang: str) -> str:
    """What is printed: for the document's three roles its own table of PPL, for anything else the general one."""
    job, table = evaluation.job, overview_of(evaluation, lang)
    if form != "text":
        return FORMATS[form](table, lang)
    left, parts = set(evaluation.told), []
    if job.ppl is not None and set(job.sources) <= set(ROLES):
        parts.append(comparison_table(tables_of(evaluation.perplexities, evaluation.parameters), lang))
        left |= {"ppl"} if job.baseline is None else set()
    return "\n\n".join([*parts, *as_text(table, lang, left)])


def tell(evaluation: Evaluation, form: str, lang: str) -> None:
    """Print the tables, and after them what is no table: to stderr where a pipe reads the tables."""
    tables, more = report(evaluation, form, lang), extras.text(evaluation.job.extras, evaluation.records, evaluation.times)
    if form == "text":
        print("\n\n".join(filter(None, (tables, more))))
    else:
        print(tables)
        print(more, end="\n" if more else "", file=sys.stderr)


def draw(path: Path, evaluation: Evaluation, lang: str) -> None:
    """The picture of `--plot`."""
    from LLMPruner.evaluator.plots import plot_overview

    plot_overview(path, overview_of(evaluation, lang), lang)
