"""The picture of a training: its loss, and those on held-out text. matplotlib is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from LLMPruner.evaluator.plots import COLORS
from LLMPruner.files import write_atomically


def plot_training(path: Path, curve: Sequence[Sequence[float]], held_out: Sequence[Mapping[str, float]], kept: int) -> None:
    """`training.png`: the logged losses `(step, nats a token)`, those of every check, and the step that was kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], color="#999999", label="trained on")
    if any(row[name] for row in held_out for name in row if name.endswith("_kl")):  # else it is the cross-entropy below
        steps, losses = [row["step"] for row in held_out], [row["eval_loss"] for row in held_out]
        axes.plot(steps, losses, marker="o", linestyle="--", color="#999999", label="the same loss, held out")
    names = [name.removeprefix("eval_").removesuffix("_nll") for name in (held_out or [{}])[0] if name.endswith("_nll")]
    for name, color in zip(names, COLORS * len(names), strict=False):
        steps, losses = [row["step"] for row in held_out], [row[f"eval_{name}_nll"] for row in held_out]
        axes.plot(steps, losses, marker="o", color=color, label=f"held out: {name} (cross-entropy)")
    axes.axvline(kept, color="black", linewidth=0.8, linestyle=":", label=f"kept: step {kept}")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
