"""What a person reads at the end: the comparison table, the results file, and the picture of the plan. No torch."""

from __future__ import annotations

import math
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import write_atomically
from LLMPruner.data import describe
from LLMPruner.plan import PruningPlan

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
            name = _pad(labels.roles[row.role], 32)
            change = _align(_change(row, by_role, labels), labels.change)
            lines.append(f"{name}| {row.ppl:>15.2f} | {row.parameters:>20,} | {change}")
        lines.append(double)
    return "\n".join(lines)


def tables_of(results: Mapping[str, Sequence[Perplexity]], parameters: Mapping[str, int]) -> dict[str, list[Row]]:
    """Rows by corpus, from the measurements and parameter counts by role."""
    tables: dict[str, list[Row]] = {}
    for role in ROLES:
        for result in results.get(role, ()):
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
        for role in ROLES
        if role in results
    }
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **environment, "models": models}


def plot_plan(path: Path, plan: PruningPlan, scores: Sequence[float] | None) -> None:
    """`pruning_strategy.png`: importance, kept KV groups and kept channels of every layer. Written atomically."""
    from matplotlib.figure import Figure

    geometry, layers = plan.geometry, range(plan.geometry.num_layers)
    figure = Figure(figsize=(min(15.0, max(8.0, 0.26 * len(layers))), 7.5), layout="constrained")
    importance, groups, channels = figure.subplots(3, 1, sharex=True)
    change = plan.total_params / geometry.dense_params - 1
    figure.suptitle(f"{geometry.dense_params:,} \u2192 {plan.total_params:,} parameters ({change:.1%})")
    if scores is None:
        importance.text(0.5, 0.5, "not measured", ha="center", va="center", color="#666666", transform=importance.transAxes)
        importance.set_yticks([])
        _title(importance, "Layer importance")
    else:
        _importance_bars(importance, scores)
    _kept_bars(groups, plan.kv_counts, geometry.num_kv_heads, "KV groups kept", "#009E73")
    _kept_bars(channels, plan.channel_counts, geometry.intermediate_size, "MLP channels kept", "#D55E00")
    channels.set_xlabel("layer")
    channels.set_xticks(range(0, len(layers), 1 if len(layers) <= 40 else 5))
    channels.set_xticks(layers, minor=True)
    channels.set_xlim(-0.7, len(layers) - 0.3)
    for axes in (importance, groups, channels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10)


def _importance_bars(axes: Any, scores: Sequence[float]) -> None:
    axes.bar(range(len(scores)), scores, color="#0072B2")
    axes.axhline(0, color="black", linewidth=0.8)
    sizes = sorted(abs(score) for score in scores)
    typical = sizes[len(sizes) // 2]
    towering = typical > 0 and sizes[-1] > 20 * typical
    if towering:  # the first layer's removal often costs a hundred times the others': linear up to twice the typical score
        axes.set_yscale("symlog", linthresh=2 * typical, linscale=1.5)
        axes.set_ylim(bottom=1.5 * min(*scores, 0.0))
    _title(axes, "Layer importance (higher: the model needs it more" + (", compressed scale)" if towering else ")"))


def _kept_bars(axes: Any, counts: Sequence[int], total: int, title: str, color: str) -> None:
    """Kept units as bars in front of the dense count, so that what was removed shows as pale ground."""
    layers = range(len(counts))
    axes.bar(layers, [total] * len(counts), color="#DDDDDD")
    axes.bar(layers, counts, color=color)
    axes.set_ylim(0, total * 1.02)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if total <= 8:
        axes.set_yticks(range(total + 1))
    _title(axes, f"{title}, of {total:,} (fewest {min(counts):,}, mean {sum(counts) / len(counts):,.1f})")


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


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _align(text: str, width: int) -> str:
    return " " * (width - _width(text)) + text
