"""The picture of what pruning did to the residual stream. matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from LLMPruner.evaluator.damage import RATIO, Damage
from LLMPruner.evaluator.plots import over_layers
from LLMPruner.files import write_atomically

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"  # told apart by the colour-blind, too (Okabe and Ito)


def plot_damage(path: Path, damage: Damage) -> None:
    """Distance and its increase, cosine, and the longest token, over the layers. A PNG, written atomically."""
    from matplotlib.figure import Figure

    layers = range(len(damage.distances))
    figure = Figure(figsize=(min(15.0, max(7.0, 0.26 * len(layers))), 7.0), layout="constrained")
    distance, cosine, longest = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    text = Path(damage.text).name  # of a corpus file
    figure.suptitle(f"KL {damage.kl:.4f} nats a token from the dense model, {damage.tokens:,} tokens of {text}", fontsize=11)
    _distances(distance, damage)
    cosine.plot(layers, damage.cosines, color=GREEN, marker=".")
    cosine.set_title("Cosine with the dense residual stream", loc="left", fontsize=10)
    _longest(longest, damage)
    over_layers((distance, cosine, longest), len(layers))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _distances(axes: Any, damage: Damage) -> None:
    """The distance as a line over the layers' own shares of it as bars, the largest in another colour."""
    from matplotlib.patches import Patch

    layers, worst = range(len(damage.distances)), damage.worst
    bars = axes.bar(layers, damage.increases, color=GREY)
    if damage.shares[worst]:
        bars[worst].set_color(RED)
    axes.plot(layers, damage.distances, color=BLUE, marker=".", label="after the layer")
    axes.axhline(0, color="black", linewidth=0.8)
    title = "Distance from the dense residual stream, over its length"
    if damage.shares[worst]:
        title += f"; layer {worst} adds {damage.shares[worst]:.0%}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(handles=[*axes.lines[:1], Patch(color=GREY, label="added by the layer")], frameon=False, fontsize=8)


def _longest(axes: Any, damage: Damage) -> None:
    """The largest ratio of lengths, and from where on it is a false massive activation."""
    axes.plot(range(len(damage.ratios)), damage.ratios, color=RED, marker=".")
    axes.axhline(1, color=GREY, linewidth=0.8)
    if max(damage.ratios) >= RATIO / 2:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(RATIO, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(
        f"Longest token: times its length in the dense model (false massive activation from {RATIO:g} on)",
        loc="left",
        fontsize=10,
    )
