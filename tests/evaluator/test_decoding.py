"""A static cache decodes what a growing one does, layer by layer of its own shape; prompts fill a card and no more."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, stock_model, tiny_model
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from LLMPruner.evaluator import decoding
from LLMPruner.evaluator.decoding import FILL_LENGTH, FILL_TOKENS, WARM_UP, StaticDecoder, decode_run, prefill_shape
from LLMPruner.evaluator.generate import greedy
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

START, STEPS = random_windows(3, 7), 6


def pruned(model):
    """The model pruned at random, layers of different KV heads, one without attention."""
    plan = random_plan(geometry_of(model))
    plan = plan.with_layer(2, LayerPlan((), plan.layers[2].channels))
    plan = plan.with_layer(1, LayerPlan((0,), plan.layers[1].channels))
    apply_plan(LayerRunner.of(model), plan)
    return model, plan


def check(model, plan) -> None:
    """The decoder's tokens, and the logits behind them, are those of the growing cache; its buffers have the plan's heads."""
    decoder, logits = StaticDecoder(model, START, STEPS), []
    head = model.get_output_embeddings().register_forward_hook(lambda _, __, output: logits.append(output[:, -1]))
    for _ in range(2):
        tokens = [decoder.token.clone()]
        for _ in range(STEPS):
            decoder.step()
            tokens.append(decoder.token.clone())
        found = torch.cat([START, *tokens], 1)
        for row in range(len(START)):
            assert found[row].equal(greedy(model, START[row : row + 1], STEPS + 1)[0])
        with torch.no_grad():
            del logits[STEPS:]
            whole = model(found).logits[:, START.shape[1] : -1]
            torch.testing.assert_close(torch.stack(logits[:STEPS], 1), whole, rtol=1e-4, atol=1e-5)
        logits.clear()
        decoder.rewind()
        logits.clear()
    head.remove()
    shapes = [None if layer.keys is None else layer.keys.shape for layer in decoder.cache.layers]
    room, width = START.shape[1] + max(STEPS, WARM_UP), plan.geometry.head_dim
    assert shapes == [(3, heads, room, width) if heads else None for heads in plan.kv_counts]


@each_architecture
def test_the_static_cache_decodes_the_same_with_layers_of_different_heads(changes):
    model, plan = pruned(tiny_model(**changes))
    assert len(set(plan.kv_counts)) > 2
    check(model, plan)


@pytest.mark.parametrize(("model", "config"), [(MistralForCausalLM, MistralConfig), (Qwen3ForCausalLM, Qwen3Config)])
def test_the_other_families_decode_the_same(model, config):
    check(*pruned(stock_model(model, config, {"sliding_window": None})))


def test_a_run_decodes_so_many_tokens_after_the_prompt(monkeypatch):
    monkeypatch.setattr(decoding, "captured", lambda decoder: seen.append(decoder) or decoder.step)
    model, seen = tiny_model(), []
    decode_run(model, START, STEPS)()
    assert int(seen[0].cache.get_seq_length()) == START.shape[1] + STEPS
    assert seen[0].token[0].item() == greedy(model, START[:1], STEPS + 1)[0, -1].item()
    assert not decoding.served(model), "on CPUs nothing is launched"


def test_prompts_fill_what_is_free_and_no_more():
    large = PruningPlan.dense(Geometry(128256, 4096, 14336, 32, 32, 8, 128, max_positions=8192))
    small = PruningPlan.dense(geometry_of(tiny_model()))
    assert prefill_shape([large], 2, 80 << 30) == (FILL_TOKENS // FILL_LENGTH, FILL_LENGTH)
    token = 2 * (3 * 14336 * 2 + 2 * 4096 * 2) + 2 * 32 * 8 * 128 * 2
    for free in (1 << 30, 3 << 30, 1 << 20):
        count, length = prefill_shape([large], 2, free)
        assert count * length * token <= free // 2 and count >= 1 and length >= 1
        assert (count + 1) * length * token > free // 2
    assert prefill_shape([small], 4, 80 << 30) == (FILL_TOKENS // 256, 256), "as long as the positions go"
    assert prefill_shape([large], 2, 0) == (1, 1)
    together = prefill_shape([small, large], 2, 3 << 30)
    assert together == ((3 << 30) // 2 // token // 256, 256), "as long as the shortest goes, as many as the largest holds"
