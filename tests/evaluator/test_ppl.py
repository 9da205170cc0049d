"""Perplexity: what a plain loop over transformers' own loss gives, and the record of what it was measured on."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

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
def strided_reference(model, ids: torch.Tensor, seq_len: int, stride: int) -> float:
    """Plain logits of one window after the other: every token once, from the window in which it has most before it."""
    total, counted, end = 0.0, 0, 1
    for start in range(0, len(ids) - seq_len + 1, stride):
        window = ids[start : start + seq_len]
        log_probs = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        for place in range(end - start, seq_len):
            if place:  # nothing predicts the first token of a window
                total, counted = total - log_probs[place - 1, window[place]].item(), counted + 1
        end = start + seq_len
    return math.exp(total / counted)


@pytest.mark.parametrize("stride", [1, 4, 10, 11])
@pytest.mark.parametrize("tokens", [1, 40, 1 << 14])
def test_strided_perplexity_is_that_of_a_plain_loop_in_which_every_token_counts_once(stride, tokens):
    model, ids = tiny_model(), random_windows(1, 53)[0]
    model.lm_head.weight.data *= 10
    windows = ids.unfold(0, 11, stride)
    ppl = perplexity_of(LayerRunner.of(model, batch_tokens=tokens), windows, stride)
    assert ppl == pytest.approx(strided_reference(model, ids, 11, stride), rel=1e-4)
    covered = 11 + (len(windows) - 1) * stride
    assert scored_tokens(*windows.shape, stride) == covered - (1 if stride < 11 else len(windows))


def test_a_stride_of_a_whole_window_is_none():
    model, runner = tiny_model(), LayerRunner.of(tiny_model())
    assert perplexity_of(runner, WINDOWS, 11) == perplexity(model, WINDOWS) == perplexity_of(runner, WINDOWS)
    (result,) = measure(runner, {"ptb": WINDOWS}, "x", "test", 4)
    assert (result.stride, result.tokens) == (4, 6 * 4 + 6) and result == Perplexity.of(result.as_dict())
