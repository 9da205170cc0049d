"""Pictures: a whole file; bars of what every layer of a plan keeps; and what was measured of models, in both languages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from conftest import geometry_of, random_plan, tiny_model
from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure

from LLMPruner.errors import UsageError
from LLMPruner.evaluator.overview import overview
from LLMPruner.evaluator.plots import PLOT_SUFFIXES, _fonts, _readable, check_plot, plot_overview, plot_plan
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: figures.append(figure) or save(figure, *a, **kw))
    return figures


def heights(axes) -> list[list[float]]:
    """Of each row of bars."""
    return [[bar.get_height() for bar in bars] for bars in axes.containers]


@pytest.mark.parametrize("layers", [4, 80])
def test_the_picture_is_a_png_that_replaces_the_old_one_whole(tmp_path, layers):
    geometry = Geometry(100, 64, 96, layers, 8, 2, 8)
    plan = PruningPlan(geometry, (LayerPlan((1,), tuple(range(40))),) * layers)
    path = tmp_path / "plan.png"
    path.write_text("old")
    plot_plan(path, plan, [1.0 + index for index in range(layers)])
    plot_plan(tmp_path / "none.png", plan, None)
    assert path.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def test_the_bars_are_the_scores_and_what_every_layer_keeps_of_its_dense_count(tmp_path, drawn):
    plan, scores = random_plan(geometry_of(tiny_model())), [0.5, -0.1, 2.0, 1.0]
    plot_plan(tmp_path / "plan.png", plan, scores)
    importance, groups, channels = drawn[0].axes
    assert heights(importance) == [scores] and importance.get_yscale() == "linear"
    assert heights(groups) == [[2] * 4, list(plan.kv_counts)]
    assert heights(channels) == [[96] * 4, list(plan.channel_counts)]
    assert f"{plan.geometry.dense_params:,}" in drawn[0].get_suptitle()
    assert f"{plan.total_params:,} parameters" in drawn[0].get_suptitle()


def test_a_score_that_towers_over_the_others_compresses_the_scale(tmp_path, drawn):
    plan = random_plan(geometry_of(tiny_model()))
    plot_plan(tmp_path / "plan.png", plan, [100.0, 0.5, 0.4, 0.6])
    assert drawn[0].axes[0].get_yscale() == "symlog" and "compressed scale" in drawn[0].axes[0].get_title(loc="left")


def test_scores_that_were_not_measured_are_said_to_be_so(tmp_path, drawn):
    plot_plan(tmp_path / "plan.png", random_plan(geometry_of(tiny_model())), None)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["not measured"] and not drawn[0].axes[0].containers


def compared(names=("dense", "half"), lang="en"):
    """What was measured of some models, ten times worse from one to the next."""
    rows = []
    for place, name in enumerate(names):
        common = {"model": name, "stderr": None, "parameters": 10**9 // (place + 1)}
        rows.append(common | {"kind": "ppl", "name": "wikitext2", "metric": "ppl", "value": 10.0 ** (place + 1)})
        for task in ("boolq", "piqa"):
            facts = {"metric": "acc", "value": 0.7 - place / 10, "stderr": 0.01, "chance": 0.5}
            rows.append(common | {"kind": "task", "name": task} | facts)
        for metric in ("prefill_rate", "peak_bytes"):
            rows.append(common | {"kind": "efficiency", "name": "efficiency", "metric": metric, "value": 1e9 * (place + 1)})
    return overview(rows, list(names), names[0], lang)


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
def test_a_comparison_shows_what_was_measured_over_size_and_by_task(tmp_path, drawn, suffix):
    plot_overview(tmp_path / f"p{suffix}", compared())
    ppl, points, memory, speed, bars = drawn[0].axes
    assert [line.get_xydata().tolist() for line in ppl.lines] == [[[1, 10]], [[0.5, 100]]] and ppl.get_yscale() == "linear"
    assert [line.get_ydata()[0] for line in points.lines] == pytest.approx([70, 60])
    assert [line.get_ydata()[0] for line in memory.lines] == pytest.approx([1, 2])
    assert speed.lines[0].get_xydata().tolist() == [[0.5, 2], [1, 1]]
    assert [[round(bar.get_height()) for bar in bars.containers[place]] for place in (1, 3)] == [[70, 70], [60, 60]]
    assert (tmp_path / f"p{suffix}").stat().st_size > 5000 and len(list(tmp_path.iterdir())) == 1
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["dense", "half"] and "boolq" in texts(drawn[0])


def test_far_apart_ppls_are_drawn_on_a_logarithmic_axis_and_broken_ones_not_at_all(tmp_path, drawn):
    table = compared(("a", "b", "c"))
    table.section("ppl")[0].values["b"] = math.nan
    plot_overview(tmp_path / "p.png", table)
    ppl = drawn[0].axes[0]
    assert ppl.get_yscale() == "log" and [line.get_ydata()[0] for line in ppl.lines] == [10, 1000]


def test_a_name_with_dollars_is_no_formula(tmp_path, drawn):
    table = compared(("$x^2$", "a$", "$\\frac$"))
    columns = [replace(column, title="$y$.txt") if column.section == "ppl" else column for column in table.columns]
    plot_overview(tmp_path / "p.svg", replace(table, columns=columns))
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [r"\$x^2\$", r"a\$", "\\$\\frac\\$"]
    said = texts(drawn[0])
    assert r"PPL, \$y\$.txt" in said and r"speed, times \$x^2\$" in said


@pytest.mark.filterwarnings("error:Glyph")
def test_labels_that_no_font_has_are_english_and_a_name_is_its_number(tmp_path, drawn, caplog, monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    _fonts.cache_clear()
    table = compared(("剪枝", "dense"), "zh")
    columns = [replace(column, title="语料.txt") if column.section == "ppl" else column for column in table.columns]
    plot_overview(tmp_path / "p.png", replace(table, columns=columns), "zh")
    (line,) = [record.getMessage() for record in caplog.records]
    said = texts(drawn[0])
    assert "no installed font" in line and "speed, times model 1" in said and "PPL, ??.txt" in said
    assert max(said) < "\u2e80"  # no character of Chinese


def test_labels_are_chinese_where_a_font_has_them(tmp_path, drawn, monkeypatch):
    real = ft2font.FT2Font

    class Font:
        def __init__(self, path):
            self.path, self.real = path, None if path == "cjk" else real(path)

        def get_charmap(self):
            return dict.fromkeys(range(0x30000), 1) if self.real is None else self.real.get_charmap()

    monkeypatch.setattr(ft2font, "FT2Font", Font)
    entry = font_manager.FontEntry(fname="cjk", name="Noto Sans CJK SC")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, entry])
    _fonts.cache_clear()
    table, lang, fonts = _readable(compared(("剪枝", "dense"), "zh"), "zh")
    _fonts.cache_clear()
    assert (table.baseline, lang, fonts) == ("剪枝", "zh", ["DejaVu Sans", "Noto Sans CJK SC"])


@pytest.mark.parametrize("path", ["p.jpg", "p", "nowhere/p.png"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--plot"):
        check_plot(path)
