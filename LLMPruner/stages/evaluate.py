"""Any number of models by any number of measurements: the order of work, and what is told of it.

Windows are cut and tasks read before the first weight. Then model by model, each loaded once and only where something of it
is missing; every figure is in the results file before the next one is measured. Speed comes last, of all models together.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner import parallel
from LLMPruner.evaluator.compare import baseline_first
from LLMPruner.evaluator.overview import FORMATS, Overview, as_text, overview
from LLMPruner.evaluator.results import Figure, Measurement, Record, Results, Subject
from LLMPruner.evaluator.table import ROLES, comparison_table, results_json, tables_of
from LLMPruner.files import locked
from LLMPruner.stages import extras
from LLMPruner.stages.evaluation_job import EvaluationJob
from LLMPruner.stages.measurements import (
    Make,
    Tokenizers,
    efficiency_measurement,
    efficiency_text,
    measure_efficiency,
    ppl_measurements,
    task_measurements,
)
from LLMPruner.stages.subjects import machine, provenance, subject_of

if TYPE_CHECKING:
    from LLMPruner.evaluator.engines import EngineTimes
    from LLMPruner.evaluator.ppl import Perplexity

logger = logging.getLogger("LLMPruner")


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
    def costs(self) -> dict[str, dict[str, Any]]:
        """Size and speed of every model, as plain values; none where they were not asked for."""
        return {record["model"]: record["details"] for record in self.records if "details" in record}

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
        said |= {"efficiency": self.costs} if self.costs else {}
        said |= extras.view(job.extras, self.records, self.times)
        paths = {name: subject.path for name, subject in self.subjects.items()}
        return results_json(self.perplexities, self.parameters, paths, **said)


def _perplexity(record: Record) -> Perplexity:
    from LLMPruner.evaluator.ppl import Perplexity

    names = ("split", "seq_len", "windows", "stride")
    settings = {name: record["settings"][name] for name in names}
    return Perplexity(record["name"], tokens=record["tokens"], ppl=record["value"], **settings)


def evaluate(job: EvaluationJob) -> Evaluation:
    """Measure what the results file has not, and keep it there.

    Raises UsageError for what only texts and tokenizers tell, and where another run writes into the file.
    """
    writes = job.results is not None and parallel.main()
    with locked(job.results) if writes else contextlib.nullcontext():
        return _evaluate(job)


def _evaluate(job: EvaluationJob) -> Evaluation:
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
        evaluation.asked.append(efficiency_measurement(subjects, job.efficiency, machine(run)))
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
    """Size and speed of all models, whose repeats interleave: all anew where one is missing. Prints the table."""
    measurement, start = evaluation.asked[-1], time.perf_counter()
    if all(evaluation.results.of(subject, measurement) for subject in evaluation.subjects.values()):
        logger.info("efficiency: all was measured before")
    else:
        sources = baseline_first(job.sources, job.dense)
        found = measure_efficiency(sources, tokenizers, job.efficiency, job.common)
        seconds = (time.perf_counter() - start) / len(found)
        for name, figures in found.items():
            evaluation.keep(name, measurement, figures, seconds)
    print(efficiency_text(baseline_first(evaluation.costs, job.dense), job.efficiency, job.common))
    evaluation.told.add("efficiency")


def _time_exports(job: EvaluationJob, evaluation: Evaluation) -> None:
    """Speed of all models in their engine, always anew."""
    start = time.perf_counter()
    evaluation.times = extras.time_exports(job.sources, job.extras, job.common, job.dense)
    seconds, where = (time.perf_counter() - start) / len(job.sources), machine(evaluation.results.run)
    measurement, figures = extras.engine_records(evaluation.times, job.sources, job.extras, where)
    for name in evaluation.subjects:
        evaluation.keep(name, measurement, figures[name], seconds)


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
