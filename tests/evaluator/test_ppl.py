"""Perplexity: what a plain loop over transformers' own loss gives, and the record of what it was measured on."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner import parallel
from LLMPruner.data.windows import cut
from LLMPruner.evaluator.ppl import Perplexity, measure, perplexity, perplexity_of, scored_tokens
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.plan import LayerPlan

WINDOWS = random_windows(6, 11)


@torch.no_grad()
def reference(model, windows: torch.Tensor) -> float:
    """The exponential of the mean loss; windows are equally long, so the mean of their means is that over all tokens."""
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    return math.exp(sum(losses) / len(losses))


@each_architecture
def test_perplexity_is_that_of_a_plain_loop_dense_and_pruned(changes):
    model = tiny_model(**changes)
    model.lm_head.weight.data *= 10  # far from guessing
    assert perplexity(model, WINDOWS) == pytest.approx(reference(model, WINDOWS), rel=1e-5)
    plan = random_plan(geometry_of(model))
    plan = plan.with_layer(1, LayerPlan((), plan.layers[1].channels))  # a removed attention too
    apply_plan(LayerRunner.of(model), plan)
    assert perplexity(model, WINDOWS) == pytest.approx(reference(model, WINDOWS), rel=1e-5)


def test_how_many_windows_go_together_does_not_count():
    model, expected = tiny_model(), reference(tiny_model(), WINDOWS)
    for tokens in (1, 25, 1 << 14):
        assert perplexity_of(LayerRunner.of(model, batch_tokens=tokens), WINDOWS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_is_nan_and_null_in_json(value):
    model = tiny_model()
    model.model.norm.weight.data[0] = value
    (result,) = measure(LayerRunner.of(model), {"ptb": WINDOWS}, "broken")
    assert math.isnan(result.ppl)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["ppl"] is None


def test_a_loss_beyond_what_a_float_can_say_is_infinite_and_null_in_json():
    model = tiny_model()
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, WINDOWS) == math.inf
    assert Perplexity("ptb", "test", 11, 6, 60, math.inf).as_dict()["ppl"] is None


def test_the_record_says_what_was_measured_and_the_log_has_a_line_for_each_corpus(caplog):
    model, windows = tiny_model(), {"ptb": WINDOWS, "wikitext2": random_windows(2, 30, seed=1)}
    with caplog.at_level(logging.INFO, "LLMPruner"):
        results = measure(LayerRunner.of(model), windows, "pruned", "validation")
    assert results == [
        Perplexity("ptb", "validation", 11, 6, 60, perplexity(model, WINDOWS)),
        Perplexity("wikitext2", "validation", 30, 2, 58, perplexity(model, windows["wikitext2"])),
    ]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("PPL pruned on ")]
    assert lines[0] == f"PPL pruned on ptb validation: {results[0].ppl:.4f} (6 windows of 11 tokens)" and len(lines) == 2
    assert measure(LayerRunner.of(model), {"ptb": WINDOWS}, "pruned")[0].split == "test"
    assert results[0].as_dict()["ppl"] == results[0].ppl


@torch.no_grad()
def guides_loop(model, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """PPL and tokens of transformers' "Perplexity of fixed-length models", each loss weighed by the tokens that it is of."""
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, len(ids), stride):
        end_loc = min(begin_loc + max_length, len(ids))
        trg_len = end_loc - prev_end_loc
        input_ids = ids[None, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        counted = int((target_ids[:, 1:] != -100).sum())
        if counted:
            nll_sum += model(input_ids=input_ids, labels=target_ids).loss.item() * counted
        n_tokens, prev_end_loc = n_tokens + counted, end_loc
        if end_loc == len(ids):
            break
    return math.exp(nll_sum / n_tokens), n_tokens


@pytest.mark.parametrize("stride", [1, 4, 7, 10, 11])
@pytest.mark.parametrize(("length", "tokens"), [(53, 1), (53, 40), (53, 1 << 14), (56, 40)])
def test_strided_perplexity_is_that_of_the_usual_loop_to_the_last_token(stride, length, tokens):
    model, ids = tiny_model(), random_windows(1, length)[0]
    model.lm_head.weight.data *= 10
    windows = cut(ids, 11, "own", "test", stride, whole=True)
    ppl, counted = guides_loop(model, ids, 11, stride)
    assert perplexity_of(LayerRunner.of(model, batch_tokens=tokens), windows, stride) == pytest.approx(ppl, rel=1e-4)
    assert scored_tokens(windows, stride) == counted and (stride == 11 or counted == length - 1)


def test_the_end_of_the_text_counts_once_for_any_number_of_processes(monkeypatch):
    model, windows, parts = tiny_model(), cut(random_windows(1, 53)[0], 11, "own", "test", 4, whole=True), []
    alone = perplexity_of(LayerRunner.of(model), windows, 4)
    monkeypatch.setattr(parallel, "gathered", lambda losses: parts.append(losses) or losses)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        perplexity_of(LayerRunner.of(model), windows, 4)
    assert math.exp(torch.cat(parts).sum().item() / scored_tokens(windows, 4)) == pytest.approx(alone, rel=1e-9)


def test_a_stride_of_a_whole_window_is_none():
    model, runner = tiny_model(), LayerRunner.of(tiny_model())
    assert perplexity_of(runner, WINDOWS, 11) == perplexity(model, WINDOWS) == perplexity_of(runner, WINDOWS)
    (result,) = measure(runner, {"ptb": WINDOWS}, "x", "test", 4)
    assert (result.stride, result.tokens) == (4, 6 * 4 + 6) and result == Perplexity.of(result.as_dict())
