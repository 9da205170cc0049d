"""The comparison table, to the character, and the results file."""

from __future__ import annotations

import json
import math

import pytest

from LLMPruner.evaluator.ppl import Perplexity
from LLMPruner.evaluator.table import Row, comparison_table, results_json, tables_of

DOCUMENT = """\
================================================================================
PPL 对比结果
================================================================================

数据集: wikitext2 (wikitext-2-raw-v1)
--------------------------------------------------------------------------------
模型                           |             PPL |               参数量 |            变化
--------------------------------------------------------------------------------
原始模型                        |           12.34 |        8,030,261,248 |            基准
剪枝后模型                      |           80.85 |        6,024,195,936 |         +555.2%
微调后模型                      |           35.82 |        6,024,195,936 |  -55.7% (vs剪枝)
================================================================================"""

ORIGINAL = Row("original", 12.34, 8_030_261_248)
PRUNED = Row("pruned", 80.85, 6_024_195_936)
FINETUNED = Row("finetuned", 35.82, 6_024_195_936)


def cells(*rows: Row, lang: str = "zh") -> list[str]:
    lines = comparison_table({"wikitext2": rows}, lang).splitlines()
    return [line.rsplit("|", 1)[1].strip() for line in lines[8:-1]]


def test_the_table_is_the_documents_to_the_character():
    assert comparison_table({"wikitext2": [ORIGINAL, PRUNED, FINETUNED]}) == DOCUMENT


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([ORIGINAL], ["基准"]),
        ([PRUNED], ["基准"]),
        ([FINETUNED], ["基准"]),
        ([PRUNED, FINETUNED], ["基准", "-55.7% (vs剪枝)"]),
        ([ORIGINAL, FINETUNED], ["基准", "+190.3% (vs原始)"]),
        ([ORIGINAL, Row("pruned", math.inf, 1)], ["基准", "-"]),
        ([ORIGINAL, Row("pruned", math.nan, 1)], ["基准", "-"]),
        ([ORIGINAL, Row("pruned", 12.3399, 1)], ["基准", "+0.0%"]),
    ],
)
def test_the_first_row_is_the_baseline_and_the_others_say_against_what(rows, changes):
    assert cells(*rows) == changes


def test_english_columns_line_up():
    lines = comparison_table({"ptb": [ORIGINAL, PRUNED, FINETUNED]}, "en").splitlines()
    bars = {tuple(index for index, char in enumerate(line) if char == "|") for line in lines if "|" in line}
    assert len(bars) == 1 and "Corpus: ptb" in lines and cells(ORIGINAL, lang="en") == ["baseline"]


def test_each_corpus_has_its_section_under_one_title():
    table = comparison_table({"wikitext2": [ORIGINAL], "ptb": [ORIGINAL]})
    assert table.count("PPL 对比结果") == 1 and table.count("数据集: ") == 2


def test_rows_come_in_order_and_json_holds_what_was_measured():
    measured = {role: [Perplexity("ptb", "test", 64, 3, 189, ppl)] for role, ppl in (("pruned", 9.0), ("original", math.inf))}
    parameters = {"original": 10, "pruned": 8}
    assert [row.role for row in tables_of(measured, parameters)["ptb"]] == ["original", "pruned"]
    result = results_json(measured, parameters, {"original": "a", "pruned": "b"}, seq_len=64)
    assert json.loads(json.dumps(result, allow_nan=False))["models"]["pruned"]["ppl"]["ptb"]["ppl"] == 9.0
    assert result["models"]["original"]["ppl"]["ptb"]["ppl"] is None and result["seq_len"] == 64
