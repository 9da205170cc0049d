"""The general table: a row for each model, its percentages, and the same cells in every form."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from LLMPruner.evaluator.overview import FORMATS, Overview, overview
from LLMPruner.evaluator.table import width

SIZES = {"dense": 8_000_000_000, "b&w_1|2": 6_000_000_000}


def record(model: str, kind: str, name: str, metric: str, value: float, **facts) -> dict:
    return {"model": model, "kind": kind, "name": name, "metric": metric, "value": value, "stderr": None} | {
        "parameters": SIZES[model],
        **facts,
    }


def records() -> list[dict]:
    rows = []
    for model, ppl, points, other in (("dense", 10.0, 0.75, 0.45), ("b&w_1|2", 12.5, 0.625, 0.35)):
        rows.append(record(model, "ppl", "/some/where/my.txt", "ppl", ppl))
        rows.append(record(model, "task", "boolq", "acc", points, stderr=0.01, chance=0.5))
        rows.append(record(model, "task", "arc_easy", "acc", 0.9, chance=0.25))
        rows.append(record(model, "task", "arc_easy", "acc_norm", other, chance=0.25))
        rows.append(record(model, "efficiency", "efficiency", "prefill_rate", 1000 * ppl))
    return rows


@pytest.fixture
def table() -> Overview:
    return overview(records(), list(SIZES), "dense")


def test_percentages_are_of_the_baseline_whole_and_above_chance_and_of_means(table):
    values = {column.key: column.values.get("b&w_1|2") for column in table.columns}
    assert values["ppl /some/where/my.txt change %"] == pytest.approx(25)
    assert values["boolq acc"] == 62.5 and values["arc_easy acc_norm"] == pytest.approx(35)
    assert values["boolq acc % of baseline"] == pytest.approx(100 * 0.625 / 0.75)
    assert values["boolq acc % of baseline above chance"] == pytest.approx(50)
    assert values["arc_easy acc_norm % of baseline above chance"] == pytest.approx(50)
    assert values["mean"] == pytest.approx((62.5 + 35) / 2)
    assert values["mean % of baseline"] == pytest.approx(100 * 48.75 / 60)
    assert values["mean % of baseline above chance"] == pytest.approx(100 * (48.75 - 37.5) / (60 - 37.5))
    assert "arc_easy acc" not in values  # of two metrics the one that papers report


def test_nothing_is_a_share_of_a_dense_model_that_guesses_or_of_an_unknown_chance():
    rows = [record(model, "task", "x", "acc", 0.5, chance=0.5) for model in SIZES]
    rows += [record(model, "task", "y", "acc", 0.5, chance=None) for model in SIZES]
    rows += [record(model, "task", "z", "word_perplexity", 20.0) for model in SIZES]
    table = overview(rows, list(SIZES), "dense")
    assert not table.section("above") and [c.title for c in table.section("kept")] == ["x", "y", "mean"]
    assert [(c.title, c.values["dense"]) for c in table.section("points")][2] == ("z (word_perplexity)", 20.0)


def test_a_share_behind_a_filter_is_one_too():
    rows = [record(model, "task", "gsm8k", "exact_match,strict-match", 0.5 - place / 4) for place, model in enumerate(SIZES)]
    rows += [record(model, "task", "boolq", "acc", 0.7) for model in SIZES]
    values = {column.key: column.values["b&w_1|2"] for column in overview(rows, list(SIZES), "dense").columns}
    assert values["gsm8k exact_match,strict-match"] == 25 and values["mean"] == pytest.approx((25 + 70) / 2)
    assert values["gsm8k exact_match,strict-match % of baseline"] == 50


def test_a_model_that_has_not_everything_is_not_in_the_means():
    rows = [r for r in records() if not (r["model"] == "dense" and r["name"] == "arc_easy")]
    table = overview(rows, list(SIZES), "dense")
    (mean,) = [column for column in table.columns if column.key == "mean"]
    assert list(mean.values) == ["b&w_1|2"] and not any("mean %" in column.key for column in table.columns)


def test_texts_of_one_file_name_are_told_apart_by_as_much_of_the_path_as_it_takes():
    names = ["/a/x/text.txt", "/b/x/text.txt", "x/text.txt", "/c/other.txt", "wikitext2", "./y/text.txt"]
    rows = [record("dense", "ppl", name, "ppl", 10.0) for name in names]
    titles = [column.title for column in overview(rows, list(SIZES), "dense").section("ppl")]
    assert titles == ["a/x/text.txt", "b/x/text.txt", "x/text.txt", "other.txt", "wikitext2", "y/text.txt"]


def test_a_model_whose_name_begins_like_an_argument_of_latex_is_none():
    rows = [record("dense", "ppl", "ptb", "ppl", 10.0) | {"model": name} for name in ("[1em]", "*", "a[*]")]
    latex = FORMATS["latex"](overview(rows, ["[1em]", "*", "a[*]"], "[1em]"), "en")
    assert [line.split(" & ")[0] for line in latex.splitlines() if " & " in line] == ["Model", "{}[1em]", "{}*", "a[*]"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_text_lines_up(table, lang):
    for block in FORMATS["text"](table, lang).split("\n\n"):
        title, *lines = block.splitlines()
        assert title and len({width(line) for line in lines}) == 1 and len(lines) == 5


def test_markdown_and_latex_hold_every_cell_and_no_name_breaks_them(table):
    markdown, latex = FORMATS["markdown"](table, "en"), FORMATS["latex"](table, "en")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    bars = [line.replace(r"\|", "").count("|") for line in rows]
    assert r"b&w_1\|2" in markdown and bars[:4] == [5, 5, 5, 5]  # model, parameters, PPL, change
    assert r"b\&w\_1|2 & 6,000,000,000 & 12.50 & +25.0\% \\" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == markdown.count("**") / 2 == 5


def test_csv_and_json_are_one_line_a_model_with_all_digits(table):
    rows = json.loads(FORMATS["json"](table, "zh"))
    assert [row["model"] for row in rows] == list(SIZES) and [row["baseline"] for row in rows] == [True, False]
    assert rows[0]["boolq acc stderr"] == pytest.approx(1) and rows[0]["ppl /some/where/my.txt change %"] is None
    read = list(csv.DictReader(io.StringIO(FORMATS["csv"](table, "zh"))))
    for row, line in zip(rows, read, strict=True):
        assert {key: str(value) if value is not None else "" for key, value in row.items()} == line


def test_a_number_that_is_none_is_a_dash_and_null():
    rows = [record("dense", "ppl", "ptb", "ppl", math.inf), record("b&w_1|2", "ppl", "ptb", "ppl", math.nan)]
    table = overview(rows, list(SIZES), "dense")
    assert FORMATS["text"](table, "en").splitlines()[-1].split()[-2:] == ["-", "-"]
    assert [row["ppl ptb"] for row in json.loads(FORMATS["json"](table, "en"))] == [None, None]
