"""The picture of the damage: a whole file, the figures as they are, and the worst layer marked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from LLMPruner.evaluator.damage import Damage
from LLMPruner.evaluator.damage_plot import RED, plot_damage

DAMAGE = Damage("wikitext2", 4096, 0.0, (1.0, 0.9, 0.8, 0.85), (0.1, 0.2, 0.7, 0.6), (1.0, 1.2, 1.5, 1.1), kl=0.5)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: figures.append(figure) or save(figure, *a, **kw))
    return figures


def test_the_picture_has_the_figures_and_marks_the_worst_layer(tmp_path, drawn):
    plot_damage(tmp_path / "d.png", DAMAGE)
    distance, cosine, longest = drawn[0].axes
    assert [bar.get_height() for bar in distance.containers[0]] == pytest.approx(DAMAGE.increases)
    assert [same_color(bar.get_facecolor(), RED) for bar in distance.containers[0]] == [False, False, True, False]
    assert tuple(distance.lines[0].get_ydata()) == DAMAGE.distances and "layer 2 adds 71%" in distance.get_title(loc="left")
    assert tuple(cosine.lines[0].get_ydata()) == DAMAGE.cosines
    assert tuple(longest.lines[0].get_ydata()) == DAMAGE.ratios and longest.get_yscale() == "linear"
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_false_massive_activations_and_no_damage_at_all_can_be_drawn(tmp_path, drawn):
    plot_damage(tmp_path / "d.png", replace(DAMAGE, ratios=(1.0, 40.0, 30.0, 20.0)))
    assert drawn[0].axes[2].get_yscale() == "log"
    plot_damage(tmp_path / "d.png", replace(DAMAGE, distances=(0.0,) * 4, ratios=(1.0,) * 4, cosines=(1.0,) * 4, kl=0.0))
    assert "adds" not in drawn[1].axes[0].get_title(loc="left")
