"""Pictures: what a plan keeps of every layer. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from LLMPruner.files import write_atomically
from LLMPruner.plan import PruningPlan


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
