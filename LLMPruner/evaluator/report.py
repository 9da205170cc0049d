"""What a person reads at the end: comparison table, results file, health report, picture of the plan. No torch."""

from __future__ import annotations

import math
import os
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LLMPruner.checkpoint import write_atomically
from LLMPruner.data import describe
from LLMPruner.errors import UsageError
from LLMPruner.plan import PruningPlan

if TYPE_CHECKING:
    from LLMPruner.evaluator.health import Health
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


def check_output_file(path: Path, flag: str) -> None:
    """Raise UsageError unless a file can be written (or replaced) at `path`; nothing is created."""
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path} is not a file: give a file name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path}: the folder {path.parent} cannot be written")


def health_text(health: Health) -> str:
    """The report a person reads: the verdict, the sizes, a row a layer, the forward test, the findings."""
    errors = health.errors
    verdict = f"HEALTHY: {health.path}"
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        verdict = f"UNHEALTHY: {errors[0].where}: {errors[0].message}{more}"
    lines = [verdict, "", f"model       {health.path}"]
    if health.layers:
        lines += _layer_lines(health)
    if health.forward is not None:
        forward = health.forward
        lines += ["", f"forward     loss {forward.loss:.3f}, guessing at random has {forward.random_loss:.3f}"]
        lines += [f"generated   {forward.text!r}"]
    lines += ["", "findings" if health.findings else "findings    none"]
    lines += [f"  {finding.severity:<8} {finding.where}: {finding.message}" for finding in health.findings]
    return "\n".join(lines)


def health_json(health: Health) -> dict[str, Any]:
    """The same report as plain values; numbers that are not finite become None, which JSON can say."""
    plan, forward = health.plan, health.forward
    return {
        "path": health.path,
        "healthy": health.healthy,
        "parameters": health.parameters,
        "dense_parameters": None if plan is None else plan.geometry.dense_params,
        "q_per_kv": None if plan is None else plan.geometry.q_per_kv,
        "layers": [_finite(asdict(layer)) for layer in health.layers],
        "findings": [asdict(finding) for finding in health.findings],
        "forward": None if forward is None else _finite(asdict(forward)),
    }


def plot_plan(path: Path, plan: PruningPlan, scores: Sequence[float] | None) -> None:
    """`pruning_strategy.png`: importance, kept KV groups and kept channels of every layer. Written atomically."""
    from matplotlib.figure import Figure

    geometry, layers = plan.geometry, range(plan.geometry.num_layers)
    figure = Figure(figsize=(max(8.0, 0.26 * len(layers)), 7.5), layout="constrained")
    importance, groups, channels = figure.subplots(3, 1, sharex=True)
    removed = plan.removed_params / geometry.dense_params
    figure.suptitle(f"{geometry.dense_params:,} to {plan.total_params:,} parameters ({removed:.1%} removed)")
    if scores is None:
        importance.text(0.5, 0.5, "layer importance was not needed", ha="center", transform=importance.transAxes)
    else:
        importance.bar(layers, scores, color="#4477AA")
        if min(scores) > 0 and max(scores) > 20 * sorted(scores)[len(scores) // 2]:
            importance.set_yscale("log")  # one towering layer would flatten the others to nothing
    importance.set_title("Layer importance (higher: the model needs it more)", loc="left", fontsize=10)
    _kept_bars(groups, plan.kv_counts, geometry.num_kv_heads, "KV groups kept", "#228833")
    _kept_bars(channels, plan.channel_counts, geometry.intermediate_size, "MLP channels kept", "#CC6677")
    channels.set_xlabel("layer")
    channels.set_xticks([index for index in layers if index % (1 if len(layers) <= 40 else 5) == 0])
    channels.set_xlim(-0.7, len(layers) - 0.3)
    for axes in (importance, groups, channels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def _kept_bars(axes: Any, counts: Sequence[int], total: int, title: str, color: str) -> None:
    """Kept units as bars in front of the dense count, so that what was removed shows as pale ground."""
    layers = range(len(counts))
    axes.bar(layers, [total] * len(counts), color="#DDDDDD")
    axes.bar(layers, counts, color=color)
    axes.set_ylim(0, total * 1.02)
    axes.set_title(f"{title}, of {total} (mean {sum(counts) / len(counts):.4g})", loc="left", fontsize=10)
    if total <= 8:
        axes.set_yticks(range(total + 1))


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


def _layer_lines(health: Health) -> list[str]:
    geometry = health.plan.geometry
    share = health.parameters / geometry.dense_params
    lines = [
        f"parameters  {health.parameters:,} of the dense {geometry.dense_params:,} ({share:.1%})",
        "",
        f"{'layer':>5}  {'KV groups':>9}  {'Q heads':>7}  {'Q:KV':>6}  {'channels':>13}  {'kept':>6}",
    ]
    for row in health.layers:
        groups, channels = f"{row.kv_groups:g}/{geometry.num_kv_heads}", f"{row.channels}/{geometry.intermediate_size}"
        ratio = f"{row.ratio:.3g}:1"
        lines.append(f"{row.layer:>5}  {groups:>9}  {row.q_heads:>7g}  {ratio:>6}  {channels:>13}  {row.kept:>6.1%}")
    return lines


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
