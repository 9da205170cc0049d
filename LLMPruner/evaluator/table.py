"""What a person reads at the end: the comparison table, and the results file. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from LLMPruner.data.corpora import describe
from LLMPruner.evaluator.columns import width

if TYPE_CHECKING:
    from LLMPruner.evaluator.ppl import Perplexity

ROLES = ("original", "pruned", "finetuned")


@dataclass(frozen=True)
class Row:
    """One line of the table: a model's role, its PPL and its parameters."""

    role: str
    ppl: float
    parameters: int


@dataclass(frozen=True)
class Labels:
    """The table's words in one language."""

    title: str
    corpus: str
    header: str
    roles: Mapping[str, str]
    baseline: str
    versus: Mapping[str, str]
    change: int  # columns of the last cell
    rule: int  # length of the lines drawn; the document's are shorter than its rows


LANGUAGES = {
    # the document's own table, to the character
    "zh": Labels(
        title="PPL 对比结果",
        corpus="数据集",
        header="模型                           |             PPL |               参数量 |            变化",
        roles={"original": "原始模型", "pruned": "剪枝后模型", "finetuned": "微调后模型"},
        baseline="基准",
        versus={"original": "vs原始", "pruned": "vs剪枝"},
        change=15,
        rule=80,
    ),
    "en": Labels(
        title="PPL comparison",
        corpus="Corpus",
        header="Model                           |             PPL |           Parameters |                Change",
        roles={"original": "Original", "pruned": "Pruned", "finetuned": "Fine-tuned"},
        baseline="baseline",
        versus={"original": "vs original", "pruned": "vs pruned"},
        change=21,
        rule=96,
    ),
}


def comparison_table(tables: Mapping[str, Sequence[Row]], lang: str = "zh") -> str:
    """The document's table: for each corpus (by name) its rows, original, pruned, fine-tuned in this order.

    The first row is the baseline. A pruned model is compared to the original, a fine-tuned one to the pruned model where
    there is one.
    """
    labels = LANGUAGES[lang]
    double, single = "=" * labels.rule, "-" * labels.rule
    lines = [double, labels.title, double]
    for corpus, rows in tables.items():
        lines += ["", f"{labels.corpus}: {describe(corpus)}", single, labels.header, single]
        by_role = {row.role: row for row in rows}
        for row in rows:
            name = padded(labels.roles[row.role], 32)
            change = aligned(_change(row, by_role, labels), labels.change)
            lines.append(f"{name}| {row.ppl:>15.2f} | {row.parameters:>20,} | {change}")
        lines.append(double)
    return "\n".join(lines)


def tables_of(results: Mapping[str, Sequence[Perplexity]], parameters: Mapping[str, int]) -> dict[str, list[Row]]:
    """Rows by corpus, from the measurements and parameter counts by role."""
    tables: dict[str, list[Row]] = {}
    for role in in_order(results):
        for result in results[role]:
            tables.setdefault(result.corpus, []).append(Row(role, result.ppl, parameters[role]))
    return tables


def results_json(
    results: Mapping[str, Sequence[Perplexity]],
    parameters: Mapping[str, int],
    paths: Mapping[str, str],
    **environment: Any,
) -> dict[str, Any]:
    """What `--save_results` writes: per model its path, parameters and PPL per corpus; and the environment it ran in."""
    models = {
        role: {
            "path": paths[role],
            "parameters": parameters[role],
            "ppl": {result.corpus: result.as_dict() for result in results[role]},
        }
        for role in in_order(results)
    }
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **environment, "models": models}


def in_order(names: Iterable[str]) -> list[str]:
    """Models by name: the document's roles first, then the others as they come."""
    given = list(names)
    return [role for role in ROLES if role in given] + [name for name in given if name not in ROLES]


def _change(row: Row, rows: Mapping[str, Row], labels: Labels) -> str:
    reference = next((role for role in _references(row.role) if role in rows), None)
    if reference is None:
        return labels.baseline
    if not (math.isfinite(row.ppl) and math.isfinite(rows[reference].ppl)):
        return "-"
    percent = round((row.ppl / rows[reference].ppl - 1) * 100, 1) + 0.0  # adding zero turns -0.0 into 0.0
    number = f"{percent:+.1f}%"
    return number if row.role == "pruned" else f"{number:>7} ({labels.versus[reference]})"


def _references(role: str) -> tuple[str, ...]:
    """What a role is compared to, first choice first."""
    return {"original": (), "pruned": ("original",), "finetuned": ("pruned", "original")}[role]


def padded(text: str, columns: int) -> str:
    """The text at the left of so many columns."""
    return text + " " * (columns - width(text))


def aligned(text: str, columns: int) -> str:
    """The text at the right of so many columns."""
    return " " * (columns - width(text)) + text
