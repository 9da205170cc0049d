"""Pictures: what a plan keeps of every layer, and how models compare. matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from LLMPruner.errors import UsageError
from LLMPruner.evaluator.overview import Column, Overview
from LLMPruner.files import check_output_file, write_atomically
from LLMPruner.plan import PruningPlan

logger = logging.getLogger("LLMPruner")


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
    channels.set_xticks(layers, minor=True)
    over_layers((importance, groups, channels), len(layers))
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def over_layers(panels: Sequence[Any], layers: int) -> None:
    """Panels one above the other with the layers below them all, and no frame."""
    lowest = panels[-1]
    lowest.set_xlabel("layer")
    lowest.set_xticks(range(0, layers, 1 if layers <= 40 else 5))
    lowest.set_xlim(-0.7, layers - 0.3)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)


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


PLOT_SUFFIXES = (".png", ".pdf", ".svg")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: told apart by all
MARKERS = "osD^vP*X"
WORDS = {
    "en": {
        "parameters": "parameters ({unit})",
        "ppl": "PPL, {name} (lower is better)",
        "mean": "tasks, mean points",
        "tasks": "points by task (lines: standard error; dashes: chance)",
        "memory": "peak memory (GB)",
        "speed": "speed, times {name}",
        "model": "model {place}",
    },
    "zh": {
        "parameters": "参数量（{unit}）",
        "ppl": "PPL，{name}（越低越好）",
        "mean": "任务平均得分",
        "tasks": "各任务得分（竖线：标准误；虚线：随机水平）",
        "memory": "峰值内存（GB）",
        "speed": "速度（相对于 {name} 的倍数）",
        "model": "模型 {place}",
    },
}
CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "SimHei", "Microsoft YaHei")


def check_plot(path: str, taken: Mapping[str, Iterable[Path]] | None = None) -> None:
    """Raise UsageError unless a picture can be written at `path`; `taken` as in `check_output_file`."""
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {path} must end in {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    check_output_file(path, "--plot", taken)


def plot_overview(path: Path, table: Overview, lang: str = "en") -> None:
    """All that was measured of the models, as far as it is there: PPL, points, memory and speed over size, bars by task.

    Of a language whose characters no installed font has, English is taken. Written atomically, as the suffix says.
    """
    from matplotlib import rc_context

    table, lang, fonts = _readable(table, lang)
    with rc_context({"font.family": fonts, "font.size": 9, "pdf.fonttype": 42}):
        figure = _overview_figure(table, WORDS[lang])
        kind = path.suffix.lower().removeprefix(".")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=200))


def _readable(table: Overview, lang: str) -> tuple[Overview, str, list[str]]:
    """The table, its language and the fonts, without a character that would be a box.

    A model whose name no font has is called by its number, a title loses what is not to be had.
    """
    fonts: list[str] = []
    if not _take(fonts, "".join(WORDS[lang].values())):
        logger.warning("--plot: no installed font has the characters of --table_lang %s, the labels are English", lang)
        lang, fonts = "en", ["DejaVu Sans"]
    said, columns = {}, []
    for place, name in enumerate(table.names, start=1):
        said[name] = _plain(name) if _take(fonts, name) else WORDS[lang]["model"].format(place=place)
    for column in table.columns:
        title = _plain("".join(char if _take(fonts, char) else "?" for char in column.title))
        values, errors = ({said[name]: number for name, number in part.items()} for part in (column.values, column.errors))
        columns.append(replace(column, title=title, values=values, errors=errors))
    return Overview(list(said.values()), said[table.baseline], columns), lang, fonts


def _plain(text: str) -> str:
    """A text in which no dollar begins a formula."""
    return text.replace("$", r"\$")


def _take(fonts: list[str], text: str) -> bool:
    """Whether a text can be read, with one more font where that is needed."""
    more = _fonts(text)
    fonts += [font for font in more or () if font not in fonts]
    return more is not None


@lru_cache(maxsize=256)
def _fonts(text: str) -> tuple[str, ...] | None:
    """Families that have all characters of a text between them: matplotlib's own, and another one where needed."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    own = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    needed = {ord(char) for char in text} - own.keys()
    if not needed:
        return ("DejaVu Sans",)
    known = {name: place for place, name in enumerate(CHINESE)}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda font: known.get(font.name, len(known))):
        if entry.name.startswith("Last Resort"):  # its glyphs are the boxes
            continue
        try:
            found = FT2Font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # listed, and gone or broken
            continue
        if needed <= found.keys():
            return "DejaVu Sans", entry.name
    return None


Panel = Callable[[Any], None]


def _overview_figure(table: Overview, words: Mapping[str, str]) -> Any:
    """Panels in rows of two, the bars over both columns, one legend of all models below."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels, tasks = list(_panels(table, words)), table.section("points")
    tasks = [column for column in tasks if column.key != "mean" and column.form == "{:.1f}"]
    rows = math.ceil(len(panels) / 2) + bool(tasks)
    figure = Figure(figsize=(7.5, 2.7 * max(rows, 1) + 0.4), layout="constrained")
    grid = figure.add_gridspec(max(rows, 1), 2)
    for place, draw in enumerate(panels):
        alone = len(panels) % 2 and place == len(panels) - 1
        draw(figure.add_subplot(grid[place // 2, :] if alone else grid[place // 2, place % 2]))
    if tasks:
        _task_bars(figure.add_subplot(grid[rows - 1, :]), tasks, table.names, words["tasks"])
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    marks = [Line2D([], [], linestyle="", label=name, **_mark(place)) for place, name in enumerate(table.names)]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(marks)), frameon=False)
    return figure


def _mark(place: int) -> dict[str, Any]:
    """How a model is marked, by its place in the table."""
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 6}


def _panels(table: Overview, words: Mapping[str, str]) -> Iterator[Panel]:
    """What is drawn over the parameters."""
    (sizes,) = table.section("size")
    tasks, costs = table.section("points"), {column.key: column for column in table.section("efficiency")}
    for column in table.section("ppl"):
        if not column.key.endswith("%"):
            yield _over_size(column, table, sizes, words, words["ppl"].format(name=column.title), steep=True)
    for column in [column for column in tasks if column.key == "mean"] or tasks[:1]:
        yield _over_size(column, table, sizes, words, words["mean"] if column.key == "mean" else column.title)
    if "peak_bytes" in costs:
        yield _over_size(costs["peak_bytes"], table, sizes, words, words["memory"], scale=1e-9)
    rates = [column for key, column in costs.items() if "rate" in key and column.values.get(table.baseline)]
    if rates:
        yield lambda axes: _speeds(axes, rates, table, sizes, words)


def _size_axis(axes: Any, sizes: Column, words: Mapping[str, str]) -> float:
    """Names the axis of parameters; returns its unit."""
    unit, said = (1e9, "B") if max(sizes.values.values()) >= 1e9 else (1e6, "M")
    axes.set_xlabel(words["parameters"].format(unit=said))
    axes.margins(x=0.12, y=0.15)
    return unit


def _over_size(
    column: Column,
    table: Overview,
    sizes: Column,
    words: Mapping[str, str],
    title: str,
    *,
    steep: bool = False,
    scale: float = 1.0,
) -> Panel:
    """A panel of one number of all models over their parameters; a logarithmic axis where `steep` ones differ tenfold."""
    from matplotlib.ticker import LogLocator

    def draw(axes: Any) -> None:
        unit = _size_axis(axes, sizes, words)
        shown = []
        for place, name in enumerate(table.names):
            value = column.values.get(name, math.nan) * scale
            if math.isfinite(value):
                shown.append(value)
                axes.plot(sizes.values[name] / unit, value, linestyle="", **_mark(place))
        if steep and shown and min(shown) > 0 and max(shown) > 10 * min(shown):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        _title(axes, title)

    return draw


def _speeds(axes: Any, rates: Sequence[Column], table: Overview, sizes: Column, words: Mapping[str, str]) -> None:
    """Each speed relative to the baseline's, over the parameters."""
    unit = _size_axis(axes, sizes, words)
    for column, style in zip(rates, ("-", "--", ":", "-.") * len(rates), strict=False):
        rows = sorted((sizes.values[name] / unit, column.values[name]) for name in table.names if name in column.values)
        ratios = [value / column.values[table.baseline] for _, value in rows]
        axes.plot([size for size, _ in rows], ratios, color="#555555", linestyle=style, marker=".", label=column.title)
    axes.axhline(1, color="#BBBBBB", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    _title(axes, words["speed"].format(name=table.baseline))


def _task_bars(axes: Any, tasks: Sequence[Column], names: Sequence[str], title: str) -> None:
    """A group of bars for each task, with standard errors and the level of chance."""
    wide = 0.8 / len(names)
    for place, name in enumerate(names):
        spots = [group + (place - (len(names) - 1) / 2) * wide for group in range(len(tasks))]
        heights = [column.values.get(name, math.nan) for column in tasks]
        errors = [column.errors.get(name, math.nan) for column in tasks]
        axes.bar(spots, heights, wide * 0.92, yerr=errors, color=_mark(place)["color"], error_kw={"elinewidth": 0.8})
    for group, column in enumerate(tasks):
        if column.chance is not None:
            axes.hlines(column.chance, group - 0.45, group + 0.45, color="#333333", linestyle="--", linewidth=0.9)
    axes.set_xticks(range(len(tasks)), [column.title.replace(" (", "\n(") for column in tasks], fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _title(axes, title)
