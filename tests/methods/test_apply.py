"""Plan to model: the pruned model is the masked dense one, works like any Llama, and repair brings its PPL down."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner.data import load_windows
from LLMPruner.evaluator.ppl import perplexity
from LLMPruner.forward import LayerRunner
from LLMPruner.methods.apply import apply_plan
from LLMPruner.methods.gqa_aware import query_columns
from LLMPruner.methods.repair import Gram, least_squares, output_error
from LLMPruner.model import find_model, load_model
from LLMPruner.plan import LayerPlan, PruningPlan

WINDOWS = random_windows()
CALIBRATION = random_windows(20, 16, seed=1)


def pruned_model(plan_seed=0, repair="none", dtype=torch.float32, **changes):
    model = tiny_model(**changes).to(dtype)
    plan = random_plan(geometry_of(model), plan_seed)
    apply_plan(LayerRunner(model), plan, repair=repair, windows=CALIBRATION)
    return model, plan


@torch.no_grad()
def masked_model(plan: PruningPlan, **changes):
    """The dense model with the output columns of everything removed set to zero."""
    model = tiny_model(**changes)
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        mask = torch.zeros(layer.self_attn.o_proj.in_features)
        mask[query_columns(kept.kv_groups, plan.geometry)] = 1
        layer.self_attn.o_proj.weight *= mask
        mask = torch.zeros(layer.mlp.down_proj.in_features)
        mask[list(kept.channels)] = 1
        layer.mlp.down_proj.weight *= mask
    return model


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
@each_architecture
def test_the_pruned_model_equals_the_masked_dense_one(changes, seed):
    model, plan = pruned_model(seed, **changes)
    torch.testing.assert_close(model(WINDOWS).logits, masked_model(plan, **changes)(WINDOWS).logits)


@pytest.mark.parametrize("repair", ["none", "least_squares"])
@each_architecture
def test_shapes_follow_the_plan_and_the_ratio_holds(changes, repair):
    model, plan = pruned_model(repair=repair, **changes)
    geometry = plan.geometry
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.k_proj.out_features == attention.v_proj.out_features == len(kept.kv_groups) * geometry.head_dim
        assert attention.q_proj.out_features == geometry.q_per_kv * attention.k_proj.out_features
        assert attention.o_proj.weight.shape == (geometry.hidden_size, attention.q_proj.out_features)
        assert mlp.down_proj.weight.shape == (geometry.hidden_size, len(kept.channels))
        assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.intermediate_size == len(kept.channels)


@each_architecture
def test_every_weight_of_a_pruned_model_owns_its_storage(changes):
    model, _ = pruned_model(repair="least_squares", **changes)
    for tensor in model.parameters():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_a_dense_plan_changes_nothing(repair):
    model, dense = tiny_model(), tiny_model()
    apply_plan(LayerRunner(model), PruningPlan.dense(geometry_of(model)), repair=repair, windows=CALIBRATION)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_repair_touches_nothing_but_the_output_projections_of_pruned_sublayers():
    repaired, plan = pruned_model(repair="least_squares")
    sliced, _ = pruned_model()
    changed = {
        name
        for (name, a), (_, b) in zip(repaired.named_parameters(), sliced.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    expected = set()
    for index, kept in enumerate(plan.layers):
        if len(kept.kv_groups) < plan.geometry.num_kv_heads:
            expected.add(f"model.layers.{index}.self_attn.o_proj.weight")
        if len(kept.channels) < plan.geometry.intermediate_size:
            expected.add(f"model.layers.{index}.mlp.down_proj.weight")
    assert changed == expected and len(expected) > 2


@each_architecture
def test_every_mlp_is_healed_on_what_reaches_it_in_the_pruned_model(changes):
    """The layers before are pruned and healed, and so is the layer's own attention, when an MLP's inputs are measured."""
    repaired, plan = pruned_model(repair="least_squares", **changes)
    for index, kept in enumerate(plan.layers):
        dense = tiny_model(**changes).model.layers[index].mlp.down_proj.weight.detach()
        whole = tuple(range(plan.geometry.intermediate_size))
        before = (*plan.layers[:index], LayerPlan(kept.kv_groups, whole))
        rest = PruningPlan.dense(plan.geometry).layers[index + 1 :]
        partly = LayerRunner(tiny_model(**changes))
        apply_plan(partly, PruningPlan(plan.geometry, before + rest), repair="least_squares", windows=CALIBRATION)
        gram, channels = Gram(), torch.tensor(kept.channels)
        partly.mlp(index, partly.attention(index, partly.layers(partly.embed(CALIBRATION), 0, index)), gram.add)
        healed = repaired.model.layers[index].mlp.down_proj.weight.detach()
        if kept.channels != whole:
            torch.testing.assert_close(healed, least_squares(dense, gram.matrix, channels), rtol=1e-3, atol=1e-4)
            sliced = output_error(dense, gram.matrix, channels, dense[:, channels])
            assert output_error(dense, gram.matrix, channels, healed) < sliced


@each_architecture
def test_cached_generation_equals_uncached(changes):
    model, _ = pruned_model(repair="least_squares", **changes)
    prompt = WINDOWS[:2, :6]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 18) and torch.equal(
        cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    )


@pytest.mark.parametrize("repair", ["none", "least_squares"])
@torch.no_grad()
def test_bfloat16_is_pruned_like_float32(repair):
    half, plan = pruned_model(repair=repair, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    whole, _ = pruned_model(repair=repair)
    a, b = half(WINDOWS).logits.float(), whole(WINDOWS).logits
    assert (a - b).norm() < 0.05 * b.norm()


def test_lora_attaches_to_a_pruned_model_and_learns():
    from peft import LoraConfig, get_peft_model

    model, _ = pruned_model()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=WINDOWS, labels=WINDOWS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert len([name for name, _ in adapted.named_parameters() if "lora_A" in name]) == len(targets) * 4


def test_repair_lowers_the_perplexity_of_a_trained_model(trained_dir, data_dir, tokenizer):
    def windows(split, samples):
        return load_windows(tokenizer, "wikitext2", split, seq_len=64, samples=samples, data_dir=str(data_dir))

    source, measured = find_model(str(trained_dir), "--base_model"), {}
    plan = PruningPlan(source.geometry, (LayerPlan((1,), tuple(range(0, 96, 2))),) * source.geometry.num_layers)
    for repair in ("none", "least_squares"):
        model = load_model(source, dtype="float32", device="cpu").model
        dense = perplexity(model, windows("test", 40))
        apply_plan(LayerRunner(model), plan, repair=repair, windows=windows("train", 60))
        measured[repair] = perplexity(model, windows("test", 40))
    assert measured["none"] > 1.5 * dense, "the plan must hurt, or this test proves nothing"
    assert measured["least_squares"] - dense < 0.7 * (measured["none"] - dense), (dense, measured)
