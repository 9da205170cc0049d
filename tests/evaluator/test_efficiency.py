"""What is counted agrees with what torch and the cache do; what is timed is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, each_architecture, geometry_of, random_plan, random_windows, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from LLMPruner.config import EfficiencyConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator import decoding, efficiency
from LLMPruner.evaluator.efficiency import (
    efficiency_table,
    flops_per_token,
    kv_bytes_per_token,
    measure_efficiency,
    prefill_flops,
    time_decode,
    time_prefill,
)
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel
from LLMPruner.plan import LayerPlan, PruningPlan

SMALL = EfficiencyConfig(prompt_tokens=16, decode_context=4, new_tokens=3, repeats=3)


def pruned(plan: PruningPlan | None = None, **changes) -> LoadedModel:
    """A tiny model pruned to a plan."""
    model = tiny_model(**changes)
    plan = plan or random_plan(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan)
    return LoadedModel(model, None, plan, {})


@each_architecture
def test_projections_and_head_are_counted_as_torch_counts_them(changes):
    loaded = pruned(**changes)
    tokens = 8
    loaded.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded.model(input_ids=random_windows(1, tokens))
    # eager attention computes all `tokens` positions for every token; the embedding is no matrix product
    without_biases = sum(counter.get_flop_counts()["Global"].values()) / tokens
    assert flops_per_token(loaded.plan, tokens) == pytest.approx(without_biases, rel=0.03)
    if not changes.get("attention_bias"):
        rotary = 2 * loaded.plan.geometry.head_dim / 2  # the angles are a matrix product too
        assert flops_per_token(loaded.plan, tokens) == pytest.approx(without_biases - rotary, abs=1)


def test_the_kv_cache_shrinks_with_the_removed_groups():
    dense = PruningPlan.dense(geometry_of(tiny_model()))
    whole = kv_bytes_per_token(pruned(dense).model)
    assert whole == 4 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head_dim, float32
    one = dense.with_layer(1, LayerPlan((0,), dense.layers[1].channels))
    none = one.with_layer(2, LayerPlan((), dense.layers[1].channels))
    assert kv_bytes_per_token(pruned(one).model) == whole * 7 // 8
    assert kv_bytes_per_token(pruned(none).model) == whole * 5 // 8


def test_every_model_is_measured_and_repeats_interleave(monkeypatch, tmp_path):
    models = {"original": pruned(PruningPlan.dense(geometry_of(tiny_model()))), "pruned": pruned()}
    order, clock = [], iter([9.0, 9.0, 1.0, 4.0, 3.0, 2.0, 2.0, 3.0])
    roles = {id(loaded.model): role for role, loaded in models.items()}

    def prefill(model, prompt):
        order.append(roles[id(model)])
        return next(clock)

    monkeypatch.setattr(efficiency, "time_prefill", prefill)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"123")
    results = measure_efficiency(models, {"original": [tmp_path / "a", tmp_path / "b"], "pruned": [tmp_path / "a"]}, SMALL)
    assert order == ["original", "pruned"] * 4
    assert results["original"].first_token_seconds == 2.0 and results["original"].prefill_rate == 8.0
    assert results["pruned"].first_token_seconds == 3.0  # of 4, 2 and 3: the first round warms up
    assert results["pruned"].parameters == models["pruned"].plan.total_params
    assert (results["original"].file_bytes, results["pruned"].file_bytes) == (6, 3)
    assert all(efficiency.Efficiency.of(json.loads(json.dumps(result.as_dict()))) == result for result in results.values())
    assert all(rate > 0 for rate in results["pruned"].decode_rates.values())
    assert results["pruned"].peak_bytes >= 4 * models["pruned"].plan.total_params


def test_decoding_continues_from_the_cache():
    loaded, lengths = pruned(), []
    forward = loaded.model.forward

    def spy(input_ids, **kwargs):
        lengths.append((tuple(input_ids.shape), kwargs.get("past_key_values") is not None))
        return forward(input_ids=input_ids, **kwargs)

    loaded.model.forward = spy
    assert time_decode(loaded.model, random_windows(2, 5), 3) > 0
    assert lengths == [((2, 5), False), ((2, 1), True), ((2, 1), True), ((2, 1), True)]
    lengths.clear()
    assert time_prefill(loaded.model, random_windows(1, 7)) > 0
    assert lengths == [((1, 7), False)]


def test_the_table_has_ratios_to_the_first_model():
    row = efficiency.Efficiency(1000, 4_000_000, 2_000_000, 64, 100.0, {1: 10.0, 8: 50.0}, 0.5, 9_000_000)
    half = efficiency.Efficiency(750, 3_000_000, 1_500_000, 32, 130.0, {1: 12.0, 8: 60.0}, 0.4, 8_000_000)
    text = efficiency_table({"original": row, "pruned": half}, "cpu", "float32", SMALL)
    assert "cpu, float32" in text.splitlines()[0] and "threads" in text.splitlines()[0]
    lines = {line[:36].strip(): line[36:].split() for line in text.splitlines()[2:]}
    assert lines["parameters"] == ["1,000", "(1.000x)", "750", "(0.750x)"]
    assert lines["KV cache a token (bytes)"] == ["64", "(1.000x)", "32", "(0.500x)"]
    assert lines["decode (tokens/s, batch 8)"][-1] == "(1.200x)"
    assert row.as_dict()["decode_rates"] == {"1": 10.0, "8": 50.0}


def test_what_is_served_stands_beside_what_python_launches(monkeypatch, tmp_path):
    """All but the capture itself, which needs a GPU: the steps are taken as they are."""
    models = {"original": pruned(PruningPlan.dense(geometry_of(tiny_model()))), "pruned": pruned()}
    monkeypatch.setattr(efficiency, "served", lambda _: True)
    monkeypatch.setattr(decoding, "captured", lambda decoder: decoder.step)
    monkeypatch.setattr(efficiency, "filling_prompt", lambda _: (3, 20))
    monkeypatch.setattr(efficiency, "time_prefill", lambda _, prompt: 2.0 if prompt.shape == (3, 20) else 4.0)
    (tmp_path / "m.bin").write_bytes(b"123")
    results = measure_efficiency(models, dict.fromkeys(models, [tmp_path / "m.bin"]), SMALL)
    assert all(efficiency.Efficiency.of(json.loads(json.dumps(result.as_dict()))) == result for result in results.values())
    assert all(len(result.served_decode_rates) == 2 for result in results.values())
    assert {(result.served_prefill_rate, result.prefill_rate) for result in results.values()} == {(3 * 20 / 2, 16 / 4)}
    plan = models["pruned"].plan
    assert results["pruned"].prefill_flops == prefill_flops(plan, 20) and results["pruned"].served_prompt == (3, 20)
    lines = efficiency_table(results, "cuda", "float32", SMALL).splitlines()
    labels = [line[:36].strip() for line in lines]
    assert "decode, a graph (tokens/s, batch 1)" in labels and "prefill (tokens/s, 3 x 20)" in labels
    assert "decode (tokens/s, batch 1)" in labels and "prefill (tokens/s, 1 x 16)" in labels
    rates = results["pruned"].served_decode_rates, results["pruned"].served_prefill_rate
    assert f"{results['pruned'].decode_bytes * rates[0][1] / 1e9:,.1f} GB/s" in lines[-2] and "(a graph)" in lines[-2]
    assert f"{results['pruned'].prefill_flops * rates[1] / 1e12:,.2f} TFLOP/s" in lines[-1]


def test_the_table_says_what_bounds_the_rates():
    dense, plan = pruned(PruningPlan.dense(geometry_of(tiny_model()))), random_plan(geometry_of(tiny_model()))
    settings = {"served_prompt": None, "decode_bytes": 4000, "prefill_flops": 3000}
    row = efficiency.Efficiency(1, 1, 1, 1, 100.0, {1: 10.0, 8: 50.0}, 0.5, 1, **settings)
    half = replace(row, decode_bytes=3000, prefill_flops=2400)
    decode, prefill = efficiency.bounds({"original": row, "pruned": half})
    assert "(1.333x)" in decode and "a graph" not in decode and "(1.250x)" in prefill
    assert efficiency.bounds({"original": replace(row, decode_bytes=0)}) == []
    assert prefill_flops(dense.plan, 1) == flops_per_token(dense.plan, 1)
    many, head = prefill_flops(plan, 100), 2 * VOCAB * 64
    assert many == pytest.approx(flops_per_token(plan, 50.5) - head + head / 100, abs=1)


def test_an_embedding_that_is_not_the_head_is_not_read():
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        whole, embedding = efficiency.weight_bytes(model), 4 * VOCAB * 64
        assert efficiency.weight_bytes(model, read=True) == (whole if tied else whole - embedding)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(UsageError, match=f"--efficiency_{name} must be 1 or more"):
        EfficiencyConfig(**{name: 0})
