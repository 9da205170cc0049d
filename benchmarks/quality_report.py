"""What benchmarks/quality.py measured as a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CORPORA = ("wikitext2", "ptb", "news")  # measured on, in this order
PLOT_TOP = 1000  # perplexity


def table(record: dict[str, Any]) -> str:
    """A Markdown table for every calibration corpus: of several seeds the median, and the worst behind it."""
    lines = []
    dense = record["dense"]["results"]
    for corpus in _calibrations(record):
        lines += [
            f"Calibrated on {corpus}, {record['windows']} windows of {record['seq_len']} per corpus, {record['dtype']}"
            + ", raw text" * (record.get("text_format") == "raw")
            + ":",
            "",
        ]
        head = ["ratio", "method", "seeds", *(f"PPL {name}" for name in CORPORA), *(f"KL {name}" for name in CORPORA)]
        head += ["removed", "calibration tokens", "seconds", "peak GB", "commit"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        values = [f"{dense[name]['ppl']:.2f}" for name in CORPORA] + ["0"] * len(CORPORA)
        lines.append("| " + " | ".join(["0", "dense", "", *values, "0", "", "", "", ""]) + " |")
        groups = list(_draws([row for row in record["rows"] if row["calibration"] == corpus]))
        for rows in sorted(groups, key=lambda rows: (rows[0]["ratio"], -_median(rows, "wikitext2"))):
            lines.append("| " + " | ".join(_cells(rows)) + " |")
        lines.append("")
    return "\n".join(lines)


def _calibrations(record: dict[str, Any]) -> list[str]:
    """The calibration corpora in the order of the tables."""
    return sorted({row["calibration"] for row in record["rows"]}, reverse=True)


def _draws(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of one calibration corpus by method and ratio: those that differ by their seed alone."""
    for method, ratio in dict.fromkeys((row["row"], row["ratio"]) for row in rows):
        yield [row for row in rows if (row["row"], row["ratio"]) == (method, ratio)]


def _cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    results = [row["results"] for row in rows]
    cells = [f"{rows[0]['ratio']:g}", rows[0]["row"], str(len(rows))]
    cells += [_summary([result[name]["ppl"] for result in results], _figure) for name in CORPORA]
    for name in CORPORA:
        known = [result[name]["kl"] for result in results if "kl" in result[name]]  # the peers' have none
        cells.append(_summary(known, "{:.3f}".format) if known else "")
    cells += [f"{statistics.median(row['removed'] for row in rows):,.0f}", f"{rows[0]['calibration_tokens']:,}"]
    cells += [f"{statistics.median(row['seconds'] for row in rows):.0f}", f"{max(row['peak_memory_gb'] for row in rows):.2f}"]
    return [*cells, " ".join(dict.fromkeys(row["commit"] for row in rows if row.get("commit")))]


def _summary(values: Sequence[float], shown: Callable[[float], str]) -> str:
    middle, worst = shown(statistics.median(values)), shown(max(values))
    return middle if middle == worst else f"{middle} ({worst})"


def _figure(ppl: float) -> str:
    return f"{ppl:.2f}" if ppl < 1e4 else f"{ppl:.2g}"


def _median(rows: Sequence[dict[str, Any]], corpus: str) -> float:
    return statistics.median(row["results"][corpus]["ppl"] for row in rows)


def plot(path: Path, record: dict[str, Any]) -> None:
    """PPL over removed parameters, one line per method, one panel per test corpus (calibrated on the table's first corpus).

    Of several seeds the median is drawn, and a bar up to the worst. Other tools' own code is dashed: its rows know no plan.
    """
    from matplotlib.figure import Figure

    corpus = _calibrations(record)[0]
    rows = [row for row in record["rows"] if row["calibration"] == corpus]
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(
        f"PPL over removed parameters (calibrated on {corpus}, {record['windows']} test windows of {record['seq_len']}; "
        f"what goes beyond {PLOT_TOP:,} collapsed)"
    )
    panels = figure.subplots(1, len(CORPORA))
    draws = list(_draws(rows))
    names = list(dict.fromkeys(same[0]["row"] for same in sorted(draws, key=lambda same: _median(same, "wikitext2"))))
    tools = {row["row"] for row in rows if row["channels"] is None}
    markers = "osD^vP*X<>hp8d"
    for axes, name in zip(panels, CORPORA, strict=True):
        base = record["dense"]["results"][name]["ppl"]
        for place, method in enumerate(names):
            mine = sorted((same for same in draws if same[0]["row"] == method), key=lambda same: same[0]["ratio"])
            removed = [statistics.median(row["removed"] for row in same) / 1e6 for same in mine]
            middle = [_median(same, name) for same in mine]
            above = [max(row["results"][name]["ppl"] for row in same) - value for same, value in zip(mine, middle, strict=True)]
            style = {"linewidth": 2.5, "zorder": 5} if method in ("best", "default") else {"linewidth": 1.2}
            style |= {"marker": markers[place % len(markers)], "linestyle": "--" if method in tools else "-"}
            bars = [[0] * (len(above) + 1), [0, *above]]
            color = f"C{place % 10}"
            axes.errorbar([0, *removed], [base, *middle], yerr=bars, capsize=3, color=color, label=method, **style)
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
