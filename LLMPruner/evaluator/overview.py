"""The general table: a row for each model, a column for each measurement, as text, Markdown, LaTeX, CSV or JSON. No torch.

It comes in sections that fit a page: PPL; tasks in points; what they are in percent of the dense model; and the same above
chance, which says how much of what was learned is left (a model that guesses keeps 50% of a dense 50 points on two choices,
and 0% above chance). A mean is that of the columns, and its percentages are those of the means.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LLMPruner.evaluator.results import Record
from LLMPruner.evaluator.table import aligned, padded, width
from LLMPruner.evaluator.tasks import shown_metric

SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1", "mcc")  # metrics up to 1, shown in points of 100
WORDS = {
    "en": {
        "model": "Model",
        "parameters": "Parameters",
        "ppl": "PPL (lower is better)",
        "points": "Tasks, points",
        "kept": "Tasks, % of {baseline}",
        "above": "Tasks, % of {baseline} above chance",
        "efficiency": "Efficiency",
        "mean": "mean",
        "change": "change",
    },
    "zh": {
        "model": "模型",
        "parameters": "参数量",
        "ppl": "PPL（越低越好）",
        "points": "任务得分",
        "kept": "任务得分占 {baseline} 的百分比",
        "above": "高于随机水平的得分占 {baseline} 的百分比",
        "efficiency": "效率",
        "mean": "平均",
        "change": "变化",
    },
}


@dataclass(frozen=True)
class Column:
    """Numbers of all models, by name: NaN where one is not finite, none where it was not measured."""

    section: str  # a key of WORDS
    title: str
    key: str  # for machines
    form: str
    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    chance: float | None = None


@dataclass(frozen=True)
class Overview:
    """All columns, and the rows in order."""

    names: Sequence[str]
    baseline: str
    columns: Sequence[Column]

    def section(self, name: str) -> list[Column]:
        """Its columns."""
        return [column for column in self.columns if column.section == name]


def overview(records: Iterable[Record], names: Sequence[str], baseline: str, lang: str = "en") -> Overview:
    """The table of some records; of a task the metric that papers report."""
    measured: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        place = (record["kind"], record.get("task", record["name"]), record["metric"])
        measured.setdefault(place, {})[record["model"]] = record
    sizes = {record["model"]: record["parameters"] for rows in measured.values() for record in rows.values()}
    columns = [Column("size", WORDS[lang]["parameters"], "parameters", "{:,.0f}", sizes)]
    corpora = [name for kind, name, _ in measured if kind == "ppl"]
    for name, title in zip(corpora, short_paths(corpora), strict=True):
        columns += _ppl_columns(name, title, measured["ppl", name, "ppl"], baseline, lang)
    columns += _task_columns({place[1:]: rows for place, rows in measured.items() if place[0] == "task"}, baseline, lang)
    for (kind, _, metric), rows in measured.items():
        if kind == "efficiency" and metric != "parameters":
            values = {model: record["value"] for model, record in rows.items()}
            form = "{:,.0f}" if max(map(abs, values.values())) >= 1000 else "{:.4g}"
            columns.append(Column("efficiency", metric.replace("_", " "), metric, form, values))
    return Overview(list(names), baseline, columns)


def short_paths(names: Sequence[str]) -> list[str]:
    """Each path by its last parts, as few as no other one ends with."""
    paths, ends = [Path(name).parts for name in names], []
    for parts in paths:
        others = [other for other in paths if other != parts]
        sizes = (size for size in range(1, len(parts)) if all(other[-size:] != parts[-size:] for other in others))
        ends.append(str(Path(*parts[-next(sizes, len(parts)) :])))
    return ends


def _ppl_columns(name: str, title: str, rows: Mapping[str, Record], baseline: str, lang: str) -> list[Column]:
    """PPL, and its change in percent."""
    values = {model: record["value"] for model, record in rows.items()}
    columns = [Column("ppl", title, f"ppl {name}", "{:.2f}", values)]
    if len(values) > 1 and baseline in values:
        change = {model: 100 * (value / values[baseline] - 1) + 0.0 for model, value in values.items() if model != baseline}
        columns.append(Column("ppl", WORDS[lang]["change"], f"ppl {name} change %", "{:+.1f}%", change))
    return columns


def _task_columns(tasks: Mapping[tuple[str, str], Mapping[str, Record]], baseline: str, lang: str) -> list[Column]:
    """Points of each task and their mean, and both in percent of the baseline, whole and above chance."""
    shown: list[Column] = []
    for name in dict.fromkeys(task for task, _ in tasks):
        metric = shown_metric([of for task, of in tasks if task == name])
        rows = tasks[name, metric]
        scale, form = (100, "{:.1f}") if metric.partition(",")[0] in SHARES else (1, "{:.4g}")
        values = {model: scale * record["value"] for model, record in rows.items()}
        errors = {model: scale * record["stderr"] for model, record in rows.items() if record["stderr"] is not None}
        first = next(iter(rows.values()))
        chance = None if first.get("chance") is None else scale * first["chance"]
        shown.append(Column("points", f"{name} ({metric})", f"{name} {metric}", form, values, errors, chance))
    points = [column for column in shown if column.form == "{:.1f}"]
    guessed = [column for column in points if column.chance is not None]
    columns = shown + _mean(points, "points", lang)
    for part, section in ((points, "kept"), (guessed, "above")):
        for column in part + _mean(part, section, lang):
            floor = column.chance or 0.0 if section == "above" else 0.0
            columns += _percent(column, section, floor, baseline)
    return columns


def _mean(columns: Sequence[Column], section: str, lang: str) -> list[Column]:
    """The mean of two columns or more, of the models that have all of them."""
    if len(columns) < 2:
        return []
    models = [model for model in columns[0].values if all(model in column.values for column in columns)]
    values = {model: sum(column.values[model] for column in columns) / len(columns) for model in models}
    chance = sum(column.chance for column in columns) / len(columns) if section == "above" else None
    return [Column(section, WORDS[lang]["mean"], "mean", "{:.1f}", values, chance=chance)]


def _percent(column: Column, section: str, floor: float, baseline: str) -> list[Column]:
    """A column in percent of the baseline's, both counted from `floor`; none where the baseline is not above it."""
    whole = column.values.get(baseline, math.nan) - floor
    if not whole > 0:
        return []
    values = {model: 100 * (value - floor) / whole for model, value in column.values.items()}
    words = {"kept": "% of baseline", "above": "% of baseline above chance"}[section]
    title = column.title.partition(" (")[0]  # the metric stands over the points
    return [Column(section, title, f"{column.key} {words}", "{:.1f}", values)]


def _cell(column: Column, name: str) -> str:
    value = column.values.get(name)
    return "-" if value is None or not math.isfinite(value) else column.form.format(value)


SECTIONS = ("ppl", "points", "kept", "above", "efficiency")


def _tables(table: Overview, lang: str, leave_out: Collection[str] = ()) -> Iterable[tuple[str, list[list[str]]]]:
    """Sections as their titles and rows of cells, the head first."""
    words = WORDS[lang]
    for place, name in enumerate(name for name in SECTIONS if name not in leave_out and table.section(name)):
        columns = table.section(name)
        if place == 0:  # the first one says how large the models are
            columns = table.section("size") + columns
        head = [words["model"], *(column.title for column in columns)]
        rows = [[model, *(_cell(column, model) for column in columns)] for model in table.names]
        yield words[name].format(baseline=table.baseline), [head, *rows]


def as_text(table: Overview, lang: str = "en", leave_out: Collection[str] = ()) -> list[str]:
    """For a terminal: the sections, their columns lined up."""
    blocks = []
    for title, rows in _tables(table, lang, leave_out):
        widths = [max(map(width, cells)) for cells in zip(*rows, strict=True)]
        lines = []
        for first, *cells in rows:
            places = [aligned(cell, wide) for cell, wide in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([padded(first, widths[0]), *places]))
        rule = "-" * width(lines[0])
        blocks.append("\n".join([title, rule, lines[0], rule, *lines[1:]]))
    return blocks


def as_markdown(table: Overview, lang: str = "en") -> str:
    """A table for each section, under its title in bold."""
    blocks = []
    for title, rows in _tables(table, lang):
        cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        rule = "|---|" + "---:|" * (len(rows[0]) - 1)
        blocks.append("\n".join([f"**{title}**", "", lines[0], rule, *lines[1:]]))
    return "\n\n".join(blocks)


LATEX = {character: "\\" + character for character in "&%$#_{}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def as_latex(table: Overview, lang: str = "en") -> str:
    """A booktabs tabular for each section, under its title as a comment."""
    blocks = []
    for title, rows in _tables(table, lang):
        lines = [" & ".join("".join(LATEX.get(c, c) for c in cell) for cell in row) + r" \\" for row in rows]
        lines = ["{}" * line.startswith(("[", "*")) + line for line in lines]  # or the line before takes it for its argument
        begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
        blocks.append("\n".join([f"% {title}", begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]))
        blocks[-1] += "\n" + r"\end{tabular}"
    return "\n\n".join(blocks)


def as_rows(table: Overview) -> list[dict[str, Any]]:
    """A row of plain numbers for each model, under keys for machines; None where there is no finite one."""
    rows = []
    for name in table.names:
        row: dict[str, Any] = {"model": name, "baseline": name == table.baseline}
        for column in table.columns:
            for key, values in ((column.key, column.values), (f"{column.key} stderr", column.errors)):
                value = values.get(name)
                if values:
                    row[key] = value if value is not None and math.isfinite(value) else None
        rows.append(row)
    return rows


def as_csv(table: Overview, lang: str = "en") -> str:
    """One line a model, whatever the language, all digits."""
    rows, text = as_rows(table), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def as_json(table: Overview, lang: str = "en") -> str:
    """The lines of `as_csv` as objects."""
    return json.dumps(as_rows(table), indent=2, ensure_ascii=False, allow_nan=False)


FORMATS: dict[str, Callable[..., str]] = {
    "text": lambda table, lang: "\n\n".join(as_text(table, lang)),
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}
