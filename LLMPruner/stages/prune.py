"""The stages of pruning in order: score, plan, apply, check, measure, save, fine-tune."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from LLMPruner import parallel
from LLMPruner.data.windows import PruneWindows
from LLMPruner.importance.budget import Budget, level_limits
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LayerImportance
from LLMPruner.model.fit import Streaming
from LLMPruner.model.load import check_loads, load_model, load_tokenizer
from LLMPruner.model.source import check_token_ids
from LLMPruner.plan import PruningPlan
from LLMPruner.stages import check, records, steps, teaching
from LLMPruner.stages.forecast import Forecast, foresee, log_budget, log_comparison, log_forecast
from LLMPruner.stages.job import MODEL_FILE, PruneJob, check_exports, load_search, search_key
from LLMPruner.stages.journal import SEARCH_FILE, Journal, open_journal
from LLMPruner.stages.recover import train_and_save

if TYPE_CHECKING:
    import torch

    from LLMPruner.data.training import TrainingText
    from LLMPruner.evaluator.ppl import Perplexity
    from LLMPruner.importance.search.state import SearchState
    from LLMPruner.model.load import LoadedModel
    from LLMPruner.run import Run
    from LLMPruner.trainer.teacher import DrawnAnswers

logger = logging.getLogger("LLMPruner")


def prune(job: PruneJob, run: Run, budget: Budget, importance: LayerImportance | None = None) -> LoadedModel:
    """Run all stages of `job` into the folder of `run`, but those that a run which is resumed has finished.

    Returns the pruned (and fine-tuned) model.
    """
    job = job.sized()
    forecast = _forecast(job, run, budget)
    journal = open_journal(job, run.dir)
    journal.follow(run.stages)
    loaded, windows, text = _load(job, run, forecast, journal)
    answers = None if text is None else _answers(job, run, loaded, text, journal)
    results: dict[str, list[Perplexity]] = {}
    split = job.common.split("test")
    if job.test_original:
        results["original"] = steps.measure_once(journal, run, loaded, windows.evaluation, "original", split)
    if job.analyzes:
        importance = _scored(job, run, loaded, windows, journal)
    plan, yardstick = _decide(job, run, loaded, budget, importance, windows, journal)
    records.decided(job, run, plan, budget, importance)
    job, loaded = _healed(job, run, loaded, plan, yardstick, windows, journal)
    yardstick = None
    gc.collect()  # a model may refer to itself: the other one is to leave the device
    if loaded.plan is not plan:
        plan = loaded.plan
        records.decided(job, run, plan, budget, None)
    records.record(job, loaded, journal.done["command"])
    _save(job, run, loaded, journal)  # before anything that may take long or fail
    if job.test_pruned or job.finetune is not None:
        results["pruned"] = steps.measure_once(journal, run, loaded, windows.evaluation, "pruned", split)
    records.save_results(run, results)
    if job.finetune is not None:
        _finetune(job, run, loaded, text, answers, journal)
        results["finetuned"] = steps.measure_once(journal, run, loaded, windows.evaluation, "finetuned", split)
        records.save_results(run, results)
    if results:
        records.log_table(plan, results)
    steps.export(run, loaded, job.export)
    log_comparison(forecast, run)
    journal.finish()
    return loaded


def _forecast(job: PruneJob, run: Run, budget: Budget) -> Forecast:
    """Say what the run will remove and cost, before the weights of a model of the hub are downloaded."""
    log_budget(job, budget)
    forecast = foresee(job, budget, run.dir)
    log_forecast(forecast, job)
    run.metrics["forecast"] = forecast.as_dict()
    return forecast


def _load(
    job: PruneJob, run: Run, forecast: Forecast, journal: Journal
) -> tuple[LoadedModel, PruneWindows, TrainingText | None]:
    """Load text and model, in memory or not as the forecast has it."""
    import torch

    torch.manual_seed(job.common.seed)
    with run.stage("load"):
        tokenizer = load_tokenizer(job.source)
        windows = job.windows(tokenizer)
        parallel.check_shares(*windows.all())
        text = None if job.finetune is None else teaching.text(job.finetune, job.common, job.source, tokenizer, run.dir)
        check_token_ids(job.source, "--base_model", *windows.all(), *(() if text is None else text.all()))
        check_exports(job.source, tokenizer, job.export, job.prune)
        check_loads(job.source)
        journal.begin(windows.fingerprint() + ("" if text is None else text.fingerprint()), resumed=job.resume)
        journal.once("command", lambda: run.command)
        loaded = load_model(
            job.source,
            dtype=job.common.dtype,
            device=job.common.device,
            tokenizer=tokenizer,
            stream=None if forecast.setup.resident else Streaming(journal.work, forecast.machine.limit),
        )
        loaded.store.finished = journal.layers()
        loaded.runner.batch_tokens = journal.once("tokens of a batch", lambda: loaded.runner.batch_tokens)
        parallel.wait()  # until all have read what is finished: more will be
    return loaded, windows, text


def _scored(job: PruneJob, run: Run, loaded: LoadedModel, windows: PruneWindows, journal: Journal) -> LayerImportance:
    """The layers' scores, once a run."""

    def score() -> LayerImportance:
        with run.stage("layer importance"):
            return steps.score_layers(loaded.runner, windows.layers, job)

    return journal.once("layer importance", score, dump=asdict, load=LayerImportance.of)


def _decide(
    job: PruneJob,
    run: Run,
    loaded: LoadedModel,
    budget: Budget,
    importance: LayerImportance | None,
    windows: PruneWindows,
    journal: Journal,
) -> tuple[PruningPlan, check.Yardstick | None]:
    """The plan by the job's strategy: weights of layer scores, one ranking of all units, or the search, which also leaves a
    yardstick for what it healed."""
    scores, config = None if importance is None else importance.scores, job.prune
    kept = {"dump": PruningPlan.to_json, "load": PruningPlan.from_json}
    if config.pruning_strategy == "search":
        return _search(job, run, loaded, budget, scores, windows, journal)

    def decide() -> PruningPlan:
        with run.stage("plan"):
            seed = job.common.seed
            units = score_units(loaded.runner, budget.geometry, config.importance, windows=windows.calibration, seed=seed)
            return steps.plan_by_scores(budget, config, scores, units)

    return journal.once("plan", decide, **kept), None


def _search(
    job: PruneJob,
    run: Run,
    loaded: LoadedModel,
    budget: Budget,
    scores: Sequence[float] | None,
    windows: PruneWindows,
    journal: Journal,
) -> tuple[PruningPlan, check.Yardstick | None]:
    from LLMPruner.importance.search.search import find_levels, prepare

    key, path, config = search_key(job), run.dir / SEARCH_FILE, job.prune

    def save(found: SearchState) -> None:
        found.save(path, key)

    def search() -> tuple[PruningPlan, float]:
        state = load_search(job, run.dir, budget)
        deadline = time.monotonic() + config.search_seconds
        fitness = prepare(loaded.runner, budget, config, windows.calibration, held_out, seed=job.common.seed)
        limits = level_limits(budget, config, scores)
        find_levels(fitness, budget, config, limits=limits, state=state, save=save, deadline=deadline)
        return steps.plan_of_counts(budget, config, budget.kept(state.levels), fitness.database.scores), state.fitness

    with run.stage("search"):
        held_out = journal.windows("search", lambda: steps.search_text(loaded, windows.held_out, config, job.common))
        plan, forecast = journal.once(
            "plan",
            search,
            dump=lambda found: [found[0].to_json(), found[1]],
            load=lambda found: (PruningPlan.from_json(found[0]), found[1]),
        )
        return plan, None if "check" in journal.done else check.Yardstick.of(loaded.runner, held_out, forecast)


def _healed(
    job: PruneJob,
    run: Run,
    loaded: LoadedModel,
    plan: PruningPlan,
    yardstick: check.Yardstick | None,
    windows: PruneWindows,
    journal: Journal,
) -> tuple[PruneJob, LoadedModel]:
    """The pruned and healed model, and the job that it came of: the defaults' where the check took theirs."""
    taken = journal.done.get("check")
    if taken is not None and taken != "healed":
        job, plan = check.default_job(job), PruningPlan.from_json(taken)
        loaded.store.finished = journal.layers(defaults=True)
    _heal(job, run, loaded, plan, windows.repair, journal)
    if yardstick is None:
        return job, loaded
    with run.stage("check") as record:
        job, better = check.better(job, loaded, yardstick, record)
    if better is not loaded:
        from LLMPruner.methods.apply import keep_layers

        better.store.finished = journal.layers(defaults=True)
        keep_layers(better.runner)
    journal.record("check", "healed" if better is loaded else better.plan.to_json())
    return job, better


def _heal(job: PruneJob, run: Run, loaded: LoadedModel, plan: PruningPlan, text: torch.Tensor | None, journal: Journal) -> None:
    """Slice the model to `plan` and heal it on `text` and, where asked for, on what it wrote before."""
    if job.writes:
        with run.stage("write"):
            written = journal.windows("written", lambda: steps.write_repair_text(loaded, job.prune, job.common))
            text = steps.repair_text(text, written, job.common)
    with run.stage(f"apply (repair {job.prune.repair})"):
        loaded.plan = plan
        steps.apply(loaded.runner, plan, text, job.prune, job.common)


def _answers(job: PruneJob, run: Run, loaded: LoadedModel, text: TrainingText, journal: Journal) -> DrawnAnswers | None:
    """The dense model's answers to the text of a fine-tuning, where they are kept on disk."""
    config, params = job.finetune, loaded.plan.total_params  # the pruned model has fewer
    if not (config.distill.distill and teaching.caches(journal, job.source, config, job.common, params, here=True)):
        return None
    with run.stage("teach"):
        return teaching.answers(journal, lambda: loaded, text, config, job.common.seed)


def _finetune(
    job: PruneJob, run: Run, loaded: LoadedModel, text: TrainingText, answers: DrawnAnswers | None, journal: Journal
) -> None:
    """Fine-tune the pruned model; a teacher beside it is the dense one, loaded once more."""
    config, teacher = job.finetune, None
    if config.distill.distill and answers is None:
        teacher = teaching.Teacher(job.source, job.common, journal.work, loaded.tokenizer).whole().model
    base = run.dir / MODEL_FILE if job.save else job.source.path
    settings = {"seed": job.common.seed, "save": job.save, "base": base, "teacher": teacher, "answers": answers}
    run.metrics["training"] = train_and_save(loaded, config, text, run, journal, **settings)


def _save(job: PruneJob, run: Run, loaded: LoadedModel, journal: Journal) -> None:
    """Write the `.bin`, where asked for, unless the one that the run wrote before it died is still there."""
    if job.save or job.export.formats:
        loaded.store.settle()
    if not job.save:
        return

    def mark() -> list[int] | None:
        path = run.dir / MODEL_FILE
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None

    if parallel.from_main(mark() is None or mark() != journal.done.get("save")):
        steps.save(run, loaded, MODEL_FILE)
        journal.record("save", mark())
