"""The picture of a plan: a whole file, and bars of what every layer keeps."""

from __future__ import annotations

import pytest
from conftest import geometry_of, random_plan, tiny_model
from matplotlib.figure import Figure

from LLMPruner.evaluator.plots import plot_plan
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
