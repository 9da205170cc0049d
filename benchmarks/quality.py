"""Quality at a given size: every preset and our best at the same ratios, calibration text and evaluation windows.

One command gives one table, one JSON and one plot. Rows that the JSON has already are not measured again, so an interrupted
run continues, and what `benchmarks/peers/` adds stands beside them. What several rows share (layer scores, unit scores,
the search's costs) is computed once; every row's time counts all of it, as if the row ran alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from LLMPruner.checkpoint import write_json, write_text
from LLMPruner.config import PRESETS, PruneConfig
from LLMPruner.data import load_windows
from LLMPruner.forward import LayerRunner
from LLMPruner.importance.allocation import adds_bias, allocate, build_plan, level_limits, make_budget, reads_layer_scores
from LLMPruner.importance.criteria import score_units
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.importance.search import Database, Fitness, SearchState, improve, measure_costs
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model import load_model, versions
from LLMPruner.pipeline import SEARCH_SEQ_LEN
from LLMPruner.run import logger, peak_memory, reset_peak_memory, start_logging
from LLMPruner.source import find_model

CORPORA = ("wikitext2", "ptb", "news")
# `best-32` repairs on as few windows as the other rows: the same tokens for all.
SETTINGS = {"default": {}, **PRESETS, "best-32": PRESETS["best"] | {"repair_samples": None}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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


class Bench:
    """The dense model, the windows, and what rows share; `timed` keeps the seconds of every shared part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense = load_model(find_model(args.base_model, "--base_model"))
        self.geometry = self.dense.plan.geometry
        self.dense.model.requires_grad_(False)
        self.test = {name: self.windows(name, "test", args.seq_len, args.windows, seed=None) for name in CORPORA}
        self.reference = {name: self.last_hidden(self.dense.model, rows) for name, rows in self.test.items()}
        self.shared: dict[tuple, tuple[Any, float, float]] = {}

    def windows(self, corpus: str, split: str, seq_len: int, samples: int, seed: int | None) -> torch.Tensor:
        """Token windows of a corpus."""
        data_dir = self.args.data_dir
        return load_windows(self.dense.tokenizer, corpus, split, seq_len=seq_len, samples=samples, data_dir=data_dir, seed=seed)

    def last_hidden(self, model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states before the final norm, four windows at a time."""
        runner = LayerRunner(model)
        return [runner.layers(runner.embed(part)) for part in rows.split(4)]

    def timed(self, key: tuple, make: Any) -> tuple[Any, float, float]:
        """`make()` once per key, with its seconds and peak memory (GB)."""
        if key not in self.shared:
            reset_peak_memory()
            start = time.perf_counter()
            value = make()
            self.shared[key] = value, time.perf_counter() - start, peak_memory() / 1e9
        return self.shared[key]

    def measure(self, model: Any) -> dict[str, dict[str, float]]:
        """PPL and KL(dense || model) on every corpus."""
        runner, dense = LayerRunner(model), LayerRunner(self.dense.model)
        results = {}
        for name, rows in self.test.items():
            loss = divergence = 0.0
            for part, ours, theirs in zip(rows.split(4), self.last_hidden(model, rows), self.reference[name], strict=True):
                loss += runner.losses(ours, part).sum().item()
                for mine, other in zip(ours, theirs, strict=True):
                    divergence += runner.divergence(mine[None], dense.log_probs(other[None])) / len(rows)
            tokens = len(rows) * (rows.shape[1] - 1)
            results[name] = {"ppl": float(torch.tensor(loss / tokens, dtype=torch.float64).exp()), "kl": divergence}
        return results

    def row(self, name: str, ratio: float, corpus: str) -> dict[str, Any]:
        """One method at one ratio, calibrated on one corpus."""
        config = PruneConfig(pruning_ratio=ratio, prune_mlp=True, calibration_dataset=corpus, **SETTINGS[name])
        budget = make_budget(self.geometry, config)
        calibration = self.windows(
            corpus, "train", config.calibration_seq_len, config.channel_importance_samples, self.args.seed
        )
        repair_samples = config.repair_samples or config.channel_importance_samples
        runner = LayerRunner(self.dense.model)
        parts, scores = [], None
        if reads_layer_scores(config):
            rows = self.windows(
                corpus, "train", config.layer_importance_seq_len, config.layer_importance_samples, self.args.seed
            )
            method = LAYER_METHODS[config.layer_importance_method]
            scores, *cost = self.timed(("layers", corpus), lambda: method(runner, rows))
            parts.append(cost)
        if config.pruning_strategy == "search":
            (kept, units), *cost = self.search(runner, budget, config, calibration, parts)
        else:
            units, *cost = self.timed(
                ("units", corpus, config.importance),
                lambda: score_units(runner, self.geometry, config.importance, windows=calibration, seed=self.args.seed),
            )
            kept = allocate(budget, scores, config, units)
        parts.append(cost)
        plan = build_plan(self.geometry, kept, units, output_bias=adds_bias(config))
        model = copy.deepcopy(self.dense.model)
        reset_peak_memory()
        start = time.perf_counter()
        repair = self.windows(corpus, "train", config.calibration_seq_len, repair_samples, self.args.seed)
        apply_plan(LayerRunner(model), plan, repair=config.repair, windows=repair)
        parts.append([time.perf_counter() - start, peak_memory() / 1e9])
        assert sum(parameter.numel() for parameter in model.parameters()) == plan.total_params
        return {
            "row": name,
            "ratio": ratio,
            "calibration": corpus,
            "calibration_tokens": max(calibration.numel(), repair.numel()),
            "removed": plan.removed_params,
            "kv_groups": plan.kv_counts,
            "channels": plan.channel_counts,
            "seconds": round(sum(seconds for seconds, _ in parts), 1),
            "peak_memory_gb": round(max(memory for _, memory in parts), 2),
            "results": self.measure(model),
        }

    def search(self, runner: LayerRunner, budget: Any, config: PruneConfig, calibration: torch.Tensor, parts: list) -> Any:
        """The search of the pipeline; its database and costs, which do not depend on the ratio, are shared."""
        limits, state = level_limits(budget, config, None), SearchState()

        def prepare() -> tuple[Fitness, list[list[float]]]:
            count = config.search_tokens // SEARCH_SEQ_LEN
            held_out = self.windows(config.calibration_dataset, "validation", SEARCH_SEQ_LEN, count, self.args.seed)
            fitness, found = Fitness(Database(runner, budget), held_out), SearchState()
            measure_costs(fitness, config, calibration, limits, self.args.seed, found, lambda _: None)
            return fitness, found.costs

        (fitness, state.costs), *cost = self.timed(("search", config.calibration_dataset), prepare)
        parts.append(cost)
        reset_peak_memory()
        start = time.perf_counter()
        deadline = time.monotonic() + 60 * config.search_minutes - cost[0]
        fitness.adopt([0] * len(budget.sublayers))
        improve(fitness, budget, config, limits, self.args.seed, state, lambda _: None, deadline)
        kept = {(s.layer, s.kind): s.levels[level] for s, level in zip(budget.sublayers, state.levels, strict=True)}
        return (kept, fitness.database.scores), time.perf_counter() - start, peak_memory() / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing; write the JSON after every row, the table and the plot at the end."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quality.json"
    start_logging()
    setting = {"model": args.base_model, "windows": args.windows, "seq_len": args.seq_len, "seed": args.seed}
    record = json.loads(path.read_text()) if path.exists() else {**setting, "versions": versions(), "rows": []}
    if any(record[key] != value for key, value in setting.items()):
        print(f"error: {path} was measured with other settings: pass another --output", file=sys.stderr)
        return 2
    bench = Bench(args)
    if "dense" not in record:
        record["dense"] = {"removed": 0, "results": bench.measure(bench.dense.model)}
    done = {(row["row"], row["ratio"], row["calibration"]) for row in record["rows"]}
    for corpus in args.calibrations:
        for ratio in args.ratios:
            for name in args.rows:
                if (name, ratio, corpus) not in done:
                    record["rows"].append(bench.row(name, ratio, corpus))
                    logger.info("row: %s", {key: record["rows"][-1][key] for key in ("row", "ratio", "seconds", "results")})
                    write_json(path, record)
    write_json(path, record)
    write_text(args.output / "quality.md", table(record))
    plot(args.output / "quality.png", record)
    print(table(record))
    return 0


def table(record: dict[str, Any]) -> str:
    """A Markdown table for every calibration corpus."""
    lines = []
    dense = record["dense"]["results"]
    for corpus in sorted({row["calibration"] for row in record["rows"]}, reverse=True):
        lines += [f"Calibrated on {corpus}, {record['windows']} windows of {record['seq_len']} per corpus:", ""]
        head = ["ratio", "method", *(f"PPL {name}" for name in CORPORA), *(f"KL {name}" for name in CORPORA)]
        head += ["removed", "calibration tokens", "seconds", "peak GB"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        values = [f"{dense[name]['ppl']:.2f}" for name in CORPORA] + ["0"] * len(CORPORA)
        lines.append("| " + " | ".join(["0", "dense", *values, "0", "", "", ""]) + " |")
        rows = [row for row in record["rows"] if row["calibration"] == corpus]
        for row in sorted(rows, key=lambda row: (row["ratio"], -row["results"]["wikitext2"]["ppl"])):
            cells = [f"{row['ratio']:g}", row["row"]]
            cells += [_figure(row["results"][name]["ppl"]) for name in CORPORA]
            cells += ["" if "kl" not in row["results"][name] else f"{row['results'][name]['kl']:.3f}" for name in CORPORA]
            cells += [f"{row['removed']:,}", f"{row['calibration_tokens']:,}", f"{row['seconds']:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{row['peak_memory_gb']:.2f}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def _figure(ppl: float) -> str:
    return f"{ppl:.2f}" if ppl < 1e4 else f"{ppl:.2g}"


def plot(path: Path, record: dict[str, Any]) -> None:
    """PPL over removed parameters, one line per method, one panel per test corpus (calibrated on the first corpus)."""
    from matplotlib.figure import Figure

    corpus = record["rows"][0]["calibration"]
    rows = [row for row in record["rows"] if row["calibration"] == corpus]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(f"PPL over removed parameters (calibrated on {corpus}, {record['windows']} test windows of 512)")
    panels = figure.subplots(1, len(CORPORA))
    names = sorted(
        {row["row"] for row in rows}, key=lambda name: min(r["results"]["wikitext2"]["ppl"] for r in rows if r["row"] == name)
    )
    markers = "osD^vP*X<>hp8d"
    for axes, name in zip(panels, CORPORA, strict=True):
        base = record["dense"]["results"][name]["ppl"]
        for place, method in enumerate(names):
            points = sorted((row["removed"] / 1e6, row["results"][name]["ppl"]) for row in rows if row["row"] == method)
            style = {"linewidth": 2.5, "zorder": 5} if method in ("best", "default") else {"linewidth": 1.2}
            marker = markers[place % len(markers)]
            axes.plot(*zip((0, base), *points, strict=True), marker=marker, color=f"C{place % 10}", label=method, **style)
        axes.set_yscale("log")
        axes.set_title(f"{name} test")
        axes.set_xlabel("parameters removed (millions)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity (log)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
