"""What is counted agrees with what torch and the cache do; what is timed is timed."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from LLMPruner.config import EfficiencyConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator import efficiency
from LLMPruner.evaluator.efficiency import (
    efficiency_table,
    flops_per_token,
    kv_bytes_per_token,
    measure_efficiency,
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
    (tmp_path / "m.bin").write_bytes(b"123")
    results = measure_efficiency(models, dict.fromkeys(models, tmp_path / "m.bin"), SMALL)
    assert order == ["original", "pruned"] * 4
    assert results["original"].first_token_seconds == 2.0 and results["original"].prefill_rate == 8.0
    assert results["pruned"].first_token_seconds == 3.0  # of 4, 2 and 3: the first round warms up
    assert results["pruned"].parameters == models["pruned"].plan.total_params
    assert results["pruned"].file_bytes == 3
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


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "repeats"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(UsageError, match=f"--efficiency_{name} must be 1 or more"):
        EfficiencyConfig(**{name: 0})
