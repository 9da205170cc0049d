"""Quality at a given size: every preset and our best at the same ratios, calibration text and evaluation windows.

One command gives one table, one JSON and one plot. Rows that the JSON has already are not measured again, so an interrupted
run continues, and what `benchmarks/peers/` adds stands beside them. What several rows of a seed share (layer scores, unit
scores, the search's costs) is computed once; every row's time counts all of it, as if the row ran alone. One draw is no result:
with several `--seeds` the table gives the median and the worst of each figure.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

import torch
from quality_report import CORPORA, plot, table

from LLMPruner import cli
from LLMPruner.config import PRESETS, TEXT_FORMATS, CommonConfig, EvalConfig, PruneConfig, require_at_least
from LLMPruner.data.corpora import check_corpus
from LLMPruner.data.windows import PruneWindows, evaluation_windows
from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import read_json_file, write_json, write_text
from LLMPruner.importance.budget import Budget, level_limits, make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.search.search import Fitness, improve, measure_costs, prepare
from LLMPruner.importance.search.state import SearchState
from LLMPruner.memory import peak_memory, reset_peak_memory
from LLMPruner.model.device import dtype_name, resolve_device, resolve_dtype
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model
from LLMPruner.model.size import count_parameters
from LLMPruner.model.source import ModelSource, check_seq_len, find_model
from LLMPruner.plan import PruningPlan
from LLMPruner.run import logger, start_logging, stop_logging, versions
from LLMPruner.stages import steps
from LLMPruner.stages.job import PruneJob

SOLVED = {"distill_epochs": 0, "distill_model_epochs": 0}  # closed forms alone
# `best-32` is so, on as few windows as published methods.
SETTINGS = {
    "default": {},
    **PRESETS,
    "best-solved": PRESETS["best"] | SOLVED,
    "best-32": PRESETS["best"] | SOLVED | {"repair_samples": 32, "self_samples": 0},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="folder with wikitext-2-raw and ptb")
    parser.add_argument(
        "--text_format", default="clean", choices=TEXT_FORMATS, help="how rows become one text; raw: as in papers"
    )
    parser.add_argument("--base_model", default="embedded")
    parser.add_argument("--rows", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.25, 0.35], help="of the whole model")
    parser.add_argument("--calibrations", nargs="+", default=["wikitext2", "news"])
    parser.add_argument("--windows", type=int, default=32, help="test windows per corpus, spread evenly")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="every row once with each")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of quality.json, .md and .png")
    return parser.parse_args(argv)


def clocked(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """`make()`, its seconds, and the peak memory meanwhile (GB)."""
    reset_peak_memory()
    start = time.perf_counter()
    value = make()
    return value, time.perf_counter() - start, peak_memory() / 1e9


class Bench:
    """The dense model, the windows, and what rows of one seed share, with the seconds and memory of every shared part."""

    def __init__(self, source: ModelSource, evaluation: EvalConfig, common: CommonConfig) -> None:
        self.source, self.common = source, common
        self.dense = load_model(source)
        self.geometry = self.dense.plan.geometry
        self.dense.model.requires_grad_(False)
        self.test = evaluation_windows(self.dense.tokenizer, evaluation, common.data_dir)
        self.reference = {name: self.last_hidden(self.dense.runner, rows) for name, rows in self.test.items()}
        self.shared: dict[tuple, tuple[Any, float, float]] = {}

    def reseed(self, seed: int) -> None:
        """Go on with another seed; nothing is shared between two."""
        if seed != self.common.seed:
            self.common, self.shared = replace(self.common, seed=seed), {}

    def last_hidden(self, runner: LayerRunner, rows: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states before the final norm, four windows at a time."""
        return [runner.layers(runner.embed(part)) for part in rows.split(4)]

    def once(self, key: tuple, make: Callable[[], Any]) -> tuple[Any, float, float]:
        """`clocked(make)`, run once per key."""
        if key not in self.shared:
            self.shared[key] = clocked(make)
        return self.shared[key]

    def measure(self, runner: LayerRunner) -> dict[str, dict[str, float]]:
        """PPL and KL(dense || model) on every corpus."""
        results = {}
        for name, rows in self.test.items():
            loss = divergence = 0.0
            for part, ours, theirs in zip(rows.split(4), self.last_hidden(runner, rows), self.reference[name], strict=True):
                loss += runner.head.losses(ours, part).sum().item()
                divergence += runner.head.divergence(ours, theirs) * len(part) / len(rows)
            results[name] = {"ppl": math.exp(loss / (len(rows) * (rows.shape[1] - 1))), "kl": divergence}
        return results

    def row(self, name: str, ratio: float, corpus: str) -> dict[str, Any]:
        """One method at one ratio, calibrated on one corpus: the stages of the pruning script, one after the other."""
        job = PruneJob(self.source, prune_config(name, ratio, corpus), self.common).sized()
        windows, costs = job.windows(self.dense.tokenizer), []

        def charged(made: tuple[Any, float, float]) -> Any:
            value, *cost = made
            costs.append(cost)
            return value

        plan = self.plan(job, windows, charged)
        text = windows.repair
        if job.writes:
            key = ("written", job.prune.self_samples, job.prune.calibration_seq_len)
            written = charged(self.once(key, lambda: steps.write_repair_text(self.dense, job.prune, self.common)))
            text = steps.repair_text(text, written, self.common)
        runner = LayerRunner.of(copy.deepcopy(self.dense.model))
        charged(clocked(lambda: steps.apply(runner, plan, text, job.prune, self.common)))
        if count_parameters(runner.store.model) != plan.total_params:
            raise RunError(f"{name} at {ratio}: the model has other parameters than the plan says, {plan.total_params}")
        return {
            "row": name,
            "ratio": ratio,
            "calibration": corpus,
            "seed": self.common.seed,
            "calibration_tokens": max(windows.calibration.numel(), text.numel()),
            "removed": plan.removed_params,
            "kv_groups": plan.kv_counts,
            "channels": plan.channel_counts,
            "seconds": round(sum(seconds for seconds, _ in costs), 1),
            "peak_memory_gb": round(max(memory for _, memory in costs), 2),
            "results": self.measure(runner),
        }

    def plan(self, job: PruneJob, windows: PruneWindows, charged: Callable[[tuple[Any, float, float]], Any]) -> PruningPlan:
        """The row's plan; scores that other rows of the corpus read too are measured once."""
        config, runner, corpus = job.prune, self.dense.runner, job.prune.calibration_dataset
        budget, scores = make_budget(self.geometry, config), None
        if windows.layers is not None:
            scores = charged(self.once(("layers", corpus), lambda: steps.score_layers(runner, windows.layers, job))).scores
        if config.pruning_strategy == "search":
            plan = self.search(job, budget, windows, charged)
        else:
            settings = {"windows": windows.calibration, "seed": self.common.seed}
            score = partial(score_units, runner, self.geometry, config.importance, **settings)
            units = charged(self.once(("units", corpus, config.importance), score))
            plan = steps.plan_by_scores(budget, config, scores, units)
        if plan.removed_params < config.pruning_ratio * self.geometry.dense_params:
            raise RunError(f"the plan removes {plan.removed_params} parameters, fewer than {config.pruning_ratio}")
        return plan

    def search(
        self, job: PruneJob, budget: Budget, windows: PruneWindows, charged: Callable[[tuple[Any, float, float]], Any]
    ) -> PruningPlan:
        """The search; its database and costs, which do not depend on the ratio, are shared. No clock ends it: load must not
        change a plan."""
        config, corpus = job.prune, job.prune.calibration_dataset
        limits = level_limits(budget, config, None)

        def start() -> tuple[Fitness, list[dict[int, float]]]:
            held_out = steps.search_text(self.dense, windows.held_out, config, self.common)
            calibration, found = windows.calibration, SearchState()
            fitness = prepare(self.dense.runner, budget, config, calibration, held_out, seed=self.common.seed)
            measure_costs(fitness, limits, found, lambda _: None, math.inf)
            return fitness, found.costs

        fitness, costs = charged(self.once(("search", corpus), start))

        def go_on() -> PruningPlan:
            state = SearchState(costs=costs)
            improve(fitness, budget, config, limits, state, lambda _: None, math.inf)
            return steps.plan_of_counts(budget, config, budget.kept(state.levels), fitness.database.scores)

        return charged(self.once(("plan", corpus, config.pruning_ratio), go_on))


def prune_config(name: str, ratio: float, corpus: str) -> PruneConfig:
    """The settings of a row."""
    return PruneConfig(pruning_ratio=ratio, prune_mlp=True, calibration_dataset=corpus, **SETTINGS[name])


def recipe(argv: Sequence[str]) -> None:
    """Check, then measure what is missing; write the JSON after every row, the table and the plot at the end."""
    args = parse(argv)
    text = {"data_dir": args.data_dir, "text_format": args.text_format}
    common = [CommonConfig(seed=seed, **text) for seed in args.seeds][0]  # every seed is checked
    require_at_least("--seq_len", args.seq_len, 2)  # EvalConfig has other names for both
    require_at_least("--windows", args.windows, 0)
    evaluation = EvalConfig(CORPORA, args.seq_len, args.windows, args.text_format)
    source = find_model(args.base_model, "--base_model")
    check_seq_len(source, "--seq_len", args.seq_len)
    for corpus in CORPORA:
        check_corpus(corpus, args.data_dir, "test", args.seq_len, args.text_format)
    wanted = list(product(dict.fromkeys(args.seeds), args.calibrations, args.ratios, args.rows))
    for _, corpus, ratio, name in wanted:
        check_corpus(corpus, args.data_dir, "train", text_format=args.text_format)
        make_budget(source.geometry, prune_config(name, ratio, corpus))
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output} is not a folder")
    path = args.output / "quality.json"
    setting = {"model": args.base_model, "windows": args.windows, "seq_len": args.seq_len, "text_format": args.text_format}
    setting["dtype"] = dtype_name(resolve_dtype(common.dtype, resolve_device(common.device)))
    record = {**setting, "versions": versions(), "rows": []}
    if path.exists():
        record = {"text_format": "clean"} | read_json_file(path, "the record")  # older records do not say it
    if any(record[key] != value for key, value in setting.items()):
        raise UsageError(f"{path} was measured with other settings: pass another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    handlers = start_logging()
    try:
        fill(record, Bench(source, evaluation, common), wanted, path)
    finally:
        stop_logging(handlers)
    write_text(args.output / "quality.md", table(record))
    plot(args.output / "quality.png", record)
    print(table(record))


def fill(record: dict[str, Any], bench: Bench, wanted: Sequence[tuple[int, str, float, str]], path: Path) -> None:
    """Measure the dense model and the wanted rows that the record lacks."""
    if "dense" not in record:
        record["dense"] = {"removed": 0, "results": bench.measure(bench.dense.runner)}
    measured_by = commit()  # once: the code in this process stays what it is, whatever is committed meanwhile
    done = {(row["seed"], row["calibration"], row["ratio"], row["row"]) for row in record["rows"]}
    for seed, corpus, ratio, name in wanted:
        if (seed, corpus, ratio, name) not in done:
            bench.reseed(seed)
            record["rows"].append(bench.row(name, ratio, corpus) | {"commit": measured_by})
            logger.info("row: %s", {key: record["rows"][-1][key] for key in ("row", "ratio", "seed", "seconds", "results")})
            write_json(path, record)
    write_json(path, record)


def commit() -> str:
    """The last commit that changed the package, with `-dirty` where files differ from it; empty outside a checkout."""
    if shutil.which("git") is None:
        return ""
    folder = Path(cli.__file__).parent
    commands = (["git", "log", "-1", "--format=%h", "."], ["git", "status", "--porcelain", "."])
    answers = [subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout for command in commands]
    return answers[0].strip() + "-dirty" * bool(answers[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run_script(recipe, argv)


if __name__ == "__main__":
    sys.exit(main())
