"""Quality at a given size: every preset and our best at the same ratios, calibration text and evaluation windows.

One command gives one table, one JSON and one plot. Rows that the JSON has already are not measured again, so an interrupted
run continues, and what `benchmarks/peers/` adds stands beside them. What several rows share (layer scores, unit scores,
the search's costs) is computed once; every row's time counts all of it, as if the row ran alone.
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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script of the repository, not of an installed package

import torch
from LLMPruner.checkpoint import write_json, write_text
from LLMPruner.forward import LayerRunner
from LLMPruner.importance.database import Database
from LLMPruner.importance.search_state import SearchState
from LLMPruner.job import JobWindows, PruneJob, cut_windows
from LLMPruner.pipeline import search_text
from LLMPruner.self_text import mixed, write_windows
from LLMPruner.source import ModelSource, check_seq_len, find_model

from LLMPruner import cli
from LLMPruner.config import PRESETS, EvalConfig, PruneConfig, RunConfig, require_at_least
from LLMPruner.data import check_corpus
from LLMPruner.errors import RunError, UsageError
from LLMPruner.evaluator.ppl import load_eval_windows
from LLMPruner.importance.allocation import Budget, adds_bias, allocate, build_plan, level_limits, make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.importance.search import Fitness, fill_database, improve, measure_costs
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model import count_parameters, load_model, resolve_device, resolve_dtype, versions
from LLMPruner.run import logger, peak_memory, read_json_file, reset_peak_memory, start_logging, stop_logging

CORPORA = ("wikitext2", "ptb", "news")
PLOT_TOP = 1000  # perplexity
# `best-solved` repairs in closed form alone; `best-32` so on as few windows as the other rows, the same tokens for all.
SETTINGS = {
    "default": {},
    **PRESETS,
    "best-solved": PRESETS["best"] | {"distill_epochs": 0},
    "best-32": PRESETS["best"] | {"repair_samples": None, "self_samples": 0, "distill_epochs": 0},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="folder with wikitext-2-raw and ptb")
    parser.add_argument("--base_model", default="embedded")
    parser.add_argument("--rows", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15, 0.25, 0.35], help="of the whole model")
    parser.add_argument("--calibrations", nargs="+", default=["wikitext2", "news"])
    parser.add_argument("--windows", type=int, default=32, help="test windows per corpus, spread evenly")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of quality.json, .md and .png")
    return parser.parse_args(argv)


def clocked(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """`make()`, its seconds, and the peak memory meanwhile (GB)."""
    reset_peak_memory()
    start = time.perf_counter()
    value = make()
    return value, time.perf_counter() - start, peak_memory() / 1e9


class Bench:
    """The dense model, the windows, and what rows share, with the seconds and memory of every shared part."""

    def __init__(self, source: ModelSource, evaluation: EvalConfig, run: RunConfig) -> None:
        self.source, self.run = source, run
        self.dense = load_model(source)
        self.geometry = self.dense.plan.geometry
        self.dense.model.requires_grad_(False)
        self.test = load_eval_windows(self.dense.tokenizer, evaluation, run.data_dir)
        self.reference = {name: self.last_hidden(self.dense.model, rows) for name, rows in self.test.items()}
        self.shared: dict[tuple, tuple[Any, float, float]] = {}

    def last_hidden(self, model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states before the final norm, four windows at a time."""
        runner = LayerRunner(model)
        return [runner.layers(runner.embed(part)) for part in rows.split(4)]

    def once(self, key: tuple, make: Callable[[], Any]) -> tuple[Any, float, float]:
        """`clocked(make)`, run once per key."""
        if key not in self.shared:
            self.shared[key] = clocked(make)
        return self.shared[key]

    def measure(self, model: Any) -> dict[str, dict[str, float]]:
        """PPL and KL(dense || model) on every corpus."""
        runner = LayerRunner(model)
        results = {}
        for name, rows in self.test.items():
            loss = divergence = 0.0
            for part, ours, theirs in zip(rows.split(4), self.last_hidden(model, rows), self.reference[name], strict=True):
                loss += runner.losses(ours, part).sum().item()
                divergence += runner.divergence(ours, theirs) * len(part) / len(rows)
            results[name] = {"ppl": math.exp(loss / (len(rows) * (rows.shape[1] - 1))), "kl": divergence}
        return results

    def row(self, name: str, ratio: float, corpus: str) -> dict[str, Any]:
        """One method at one ratio, calibrated on one corpus."""
        config = prune_config(name, ratio, corpus)
        budget, runner = make_budget(self.geometry, config), LayerRunner(self.dense.model)
        job = PruneJob(self.source, config, self.run)
        windows = cut_windows(job, self.dense.tokenizer)
        costs, scores = [], None
        if windows.layers is not None:
            method = LAYER_METHODS[config.layer_importance_method]
            scores, *cost = self.once(("layers", corpus), lambda: method(runner, windows.layers))
            costs.append(cost)
        if config.pruning_strategy == "search":
            (kept, units), *cost = self.search(job, runner, budget, windows, costs)
        else:
            units, *cost = self.once(
                ("units", corpus, config.importance),
                lambda: score_units(runner, self.geometry, config.importance, windows=windows.calibration, seed=self.run.seed),
            )
            kept = allocate(budget, scores, config, units)
        costs.append(cost)
        plan = build_plan(self.geometry, kept, units, output_bias=adds_bias(config))
        if plan.removed_params < ratio * self.geometry.dense_params:
            raise RunError(f"{name} at {ratio}: the plan removes {plan.removed_params} parameters")
        text = windows.repair
        if job.writes:
            count, seq_len = config.self_samples, config.calibration_seq_len
            settings = {"samples": count, "seq_len": seq_len, "seed": self.run.seed}
            write = partial(write_windows, self.dense.model, self.dense.tokenizer, **settings)
            written, *cost = self.once(("written", count, seq_len), write)
            costs.append(cost)
            text = mixed(text, written, seed=self.run.seed)
        model = copy.deepcopy(self.dense.model)
        settings = {"repair": config.repair, "distill_epochs": config.distill_epochs, "seed": self.run.seed}
        _, *cost = clocked(lambda: apply_plan(LayerRunner(model), plan, windows=text, **settings))
        costs.append(cost)
        if count_parameters(model) != plan.total_params:
            raise RunError(f"{name} at {ratio}: {count_parameters(model)} parameters, the plan says {plan.total_params}")
        return {
            "row": name,
            "ratio": ratio,
            "calibration": corpus,
            "calibration_tokens": max(windows.calibration.numel(), text.numel()),
            "removed": plan.removed_params,
            "kv_groups": plan.kv_counts,
            "channels": plan.channel_counts,
            "seconds": round(sum(seconds for seconds, _ in costs), 1),
            "peak_memory_gb": round(max(memory for _, memory in costs), 2),
            "results": self.measure(model),
        }

    def search(
        self, job: PruneJob, runner: LayerRunner, budget: Budget, windows: JobWindows, costs: list[list[float]]
    ) -> tuple[Any, float, float]:
        """The search of the pipeline; its database and costs, which do not depend on the ratio, are shared."""
        config = job.prune
        limits, state = level_limits(budget, config, None), SearchState()

        def prepare() -> tuple[Fitness, list[dict[int, float]]]:
            database, found = Database(runner, budget.geometry, budget.sublayers), SearchState()
            fill_database(database, config, windows.calibration, self.run.seed)
            fitness = Fitness(database, search_text(job, self.dense, windows.held_out))
            measure_costs(fitness, limits, found, lambda _: None, math.inf)
            return fitness, found.costs

        (fitness, state.costs), *cost = self.once(("search", config.calibration_dataset), prepare)
        costs.append(cost)
        return self.once(
            ("plan", config.calibration_dataset, config.pruning_ratio),
            lambda: self.improve(fitness, budget, config, limits, state),
        )

    def improve(self, fitness: Fitness, budget: Budget, config: PruneConfig, limits: Any, state: SearchState):
        """The kept counts and unit scores of this budget, whatever the clock says: load must not change a plan."""
        improve(fitness, budget, config, limits, state, lambda _: None, math.inf)
        return budget.kept(state.levels), fitness.database.scores


def prune_config(name: str, ratio: float, corpus: str) -> PruneConfig:
    """The settings of a row."""
    return PruneConfig(pruning_ratio=ratio, prune_mlp=True, calibration_dataset=corpus, **SETTINGS[name])


def recipe(argv: Sequence[str]) -> None:
    """Check, then measure what is missing; write the JSON after every row, the table and the plot at the end."""
    args = parse(argv)
    run = RunConfig(seed=args.seed, data_dir=args.data_dir)
    require_at_least("--seq_len", args.seq_len, 2)  # EvalConfig has other names for both
    require_at_least("--windows", args.windows, 0)
    evaluation = EvalConfig(CORPORA, args.seq_len, args.windows)
    source = find_model(args.base_model, "--base_model")
    check_seq_len(source, "--seq_len", args.seq_len)
    for corpus in CORPORA:
        check_corpus(corpus, args.data_dir, "test", args.seq_len)
    wanted = list(product(args.calibrations, args.ratios, args.rows))
    for corpus, ratio, name in wanted:
        check_corpus(corpus, args.data_dir, "train")
        make_budget(source.geometry, prune_config(name, ratio, corpus))
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"--output {args.output} is not a folder")
    path = args.output / "quality.json"
    setting = {"model": args.base_model, "windows": args.windows, "seq_len": args.seq_len, "seed": args.seed}
    setting["dtype"] = str(resolve_dtype(run.dtype, resolve_device(run.device))).removeprefix("torch.")
    record = read_json_file(path, "the record") if path.exists() else {**setting, "versions": versions(), "rows": []}
    if any(record[key] != value for key, value in setting.items()):
        raise UsageError(f"{path} was measured with other settings: pass another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    handlers = start_logging()
    try:
        fill(record, Bench(source, evaluation, run), wanted, path)
    finally:
        stop_logging(handlers)
    write_text(args.output / "quality.md", table(record))
    plot(args.output / "quality.png", record)
    print(table(record))


def fill(record: dict[str, Any], bench: Bench, wanted: Sequence[tuple[str, float, str]], path: Path) -> None:
    """Measure the dense model and the wanted rows that the record lacks."""
    if "dense" not in record:
        record["dense"] = {"removed": 0, "results": bench.measure(bench.dense.model)}
    measured_by = commit()  # once: the code in this process stays what it is, whatever is committed meanwhile
    done = {(row["calibration"], row["ratio"], row["row"]) for row in record["rows"]}
    for corpus, ratio, name in wanted:
        if (corpus, ratio, name) not in done:
            record["rows"].append(bench.row(name, ratio, corpus) | {"commit": measured_by})
            logger.info("row: %s", {key: record["rows"][-1][key] for key in ("row", "ratio", "seconds", "results")})
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


def table(record: dict[str, Any]) -> str:
    """A Markdown table for every calibration corpus."""
    lines = []
    dense = record["dense"]["results"]
    for corpus in sorted({row["calibration"] for row in record["rows"]}, reverse=True):
        lines += [
            f"Calibrated on {corpus}, {record['windows']} windows of {record['seq_len']} per corpus, {record['dtype']}:",
            "",
        ]
        head = ["ratio", "method", *(f"PPL {name}" for name in CORPORA), *(f"KL {name}" for name in CORPORA)]
        head += ["removed", "calibration tokens", "seconds", "peak GB", "commit"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        values = [f"{dense[name]['ppl']:.2f}" for name in CORPORA] + ["0"] * len(CORPORA)
        lines.append("| " + " | ".join(["0", "dense", *values, "0", "", "", "", ""]) + " |")
        rows = [row for row in record["rows"] if row["calibration"] == corpus]
        for row in sorted(rows, key=lambda row: (row["ratio"], -row["results"]["wikitext2"]["ppl"])):
            cells = [f"{row['ratio']:g}", row["row"]]
            cells += [_figure(row["results"][name]["ppl"]) for name in CORPORA]
            cells += ["" if "kl" not in row["results"][name] else f"{row['results'][name]['kl']:.3f}" for name in CORPORA]
            cells += [f"{row['removed']:,}", f"{row['calibration_tokens']:,}", f"{row['seconds']:.0f}"]
            cells += [f"{row['peak_memory_gb']:.2f}", row.get("commit", "")]  # the peers' rows and the oldest of ours have none
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _figure(ppl: float) -> str:
    return f"{ppl:.2f}" if ppl < 1e4 else f"{ppl:.2g}"


def plot(path: Path, record: dict[str, Any]) -> None:
    """PPL over removed parameters, one line per method, one panel per test corpus (calibrated on the first corpus).

    Other tools' own code is dashed: its rows know no plan.
    """
    from matplotlib.figure import Figure

    corpus = record["rows"][0]["calibration"]
    rows = [row for row in record["rows"] if row["calibration"] == corpus]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(
        f"PPL over removed parameters (calibrated on {corpus}, {record['windows']} test windows of {record['seq_len']}; "
        f"what goes beyond {PLOT_TOP:,} collapsed)"
    )
    panels = figure.subplots(1, len(CORPORA))
    names = sorted(
        {row["row"] for row in rows}, key=lambda name: min(r["results"]["wikitext2"]["ppl"] for r in rows if r["row"] == name)
    )
    tools = {row["row"] for row in rows if row["channels"] is None}
    markers = "osD^vP*X<>hp8d"
    for axes, name in zip(panels, CORPORA, strict=True):
        base = record["dense"]["results"][name]["ppl"]
        for place, method in enumerate(names):
            points = sorted((row["removed"] / 1e6, row["results"][name]["ppl"]) for row in rows if row["row"] == method)
            style = {"linewidth": 2.5, "zorder": 5} if method in ("best", "default") else {"linewidth": 1.2}
            style |= {"marker": markers[place % len(markers)], "linestyle": "--" if method in tools else "-"}
            axes.plot(*zip((0, base), *points, strict=True), color=f"C{place % 10}", label=method, **style)
        axes.set_yscale("log")
        axes.set_ylim(0.9 * base, PLOT_TOP)  # a collapsed model would squeeze the others into one line
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(f"{name} test")
        axes.set_xlabel("parameters removed (millions)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity (log)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
