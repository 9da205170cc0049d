"""Plan to model: the pruned model is the masked dense one, works like any Llama, and repair brings its PPL down."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner.data.windows import load_windows
from LLMPruner.evaluator.ppl import perplexity
from LLMPruner.families.slicing import output_columns, output_projection
from LLMPruner.methods.apply import apply_plan
from LLMPruner.methods.moments import Moments
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan

WINDOWS = random_windows()
CALIBRATION = random_windows(20, 16, seed=1)


def pruned_model(plan_seed=0, repair="none", dtype=torch.float32, **changes):
    model = tiny_model(**changes).to(dtype)
    plan = random_plan(geometry_of(model), plan_seed)
    apply_plan(LayerRunner.of(model), plan, repair=repair, windows=CALIBRATION)
    return model, plan


@torch.no_grad()
def masked_model(plan: PruningPlan, **changes):
    """The dense model with the output columns of everything removed set to zero."""
    model = tiny_model(**changes)
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        width = plan.geometry.group_width
        columns = [group * width + column for group in kept.kv_groups for column in range(width)]
        for linear, kept_columns in ((layer.self_attn.o_proj, columns), (layer.mlp.down_proj, list(kept.channels))):
            mask = torch.zeros(linear.in_features)
            mask[kept_columns] = 1
            linear.weight *= mask
            if not len(kept_columns) and linear.bias is not None:
                linear.bias.zero_()
    return model


def scales_of(*streams: torch.Tensor) -> torch.Tensor:
    """The power of two nearest to the largest root mean square of each token; one that is zero everywhere has no size."""
    sizes = torch.stack([stream.square().mean(-1).sqrt() for stream in streams]).amax(0)
    return torch.tensor([[2.0 ** round(math.log2(size)) if size else 1.0 for size in row] for row in sizes]).unsqueeze(-1)


def without_sublayers(geometry) -> PruningPlan:
    """A plan in which layer 1 has no attention, layer 2 no MLP, and layer 3 neither."""
    whole = PruningPlan.dense(geometry).layers[0]
    plan = PruningPlan.dense(geometry).with_layer(1, LayerPlan((), whole.channels[:40]))
    return plan.with_layer(2, LayerPlan(whole.kv_groups, ())).with_layer(3, LayerPlan((), ()))


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
    apply_plan(LayerRunner.of(model), PruningPlan.dense(geometry_of(model)), repair=repair, windows=CALIBRATION)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_repair_touches_nothing_but_output_projections_and_nothing_before_the_first_pruned_layer():
    repaired, _ = pruned_model(repair="least_squares")
    sliced, _ = pruned_model()
    changed = {
        name
        for (name, a), (_, b) in zip(repaired.named_parameters(), sliced.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed) and len(changed) > 2
    assert not any(name.startswith("model.layers.0.") for name in changed), "random_plan leaves layer 0 whole"


@pytest.mark.parametrize("repair", ["bias", "least_squares"])
@torch.no_grad()
@each_architecture
def test_every_sublayer_is_healed_on_what_reaches_it_in_the_pruned_model(monkeypatch, changes, repair):
    """The inputs in the evidence are those of the final model, its targets those of the dense one.

    Of a repair that solves, both are relative to the size of the token's residual stream.
    """
    model = tiny_model(**changes)
    plan, seen = replace(random_plan(geometry_of(model)), output_bias=repair == "bias"), []
    method = REPAIRS[repair]

    def watched(evidence):
        seen.append(evidence)
        return method.heal(evidence)

    monkeypatch.setitem(REPAIRS, repair, replace(method, heal=watched))
    apply_plan(LayerRunner.of(model, batch_tokens=48), plan, repair=repair, windows=CALIBRATION)  # batch by batch
    runner, dense, checked = LayerRunner.of(model), LayerRunner.of(tiny_model(**changes)), 0
    hidden, target = runner.embed(CALIBRATION), dense.embed(CALIBRATION)
    for index in range(runner.num_layers):
        for part in plan.geometry.table.sublayers:
            rows, moments, before, target_before = [], Moments(), hidden, target
            note = lambda _, now, rows=rows: rows.append(now.inputs.flatten(0, -2))  # noqa: E731
            hidden, target = runner.sublayer(index, part, hidden, note), dense.sublayer(index, part, target)
            kept = plan.layers[index].kept(part.name)
            if len(kept) == plan.geometry.units(part.name):
                continue
            with dense.store.layer(index) as layer:
                projection = output_projection(layer, part)
            found = next(e for e in seen if torch.equal(e.weight, projection.weight))
            total, checked = found.fit + found.held_out, checked + 1
            columns = output_columns(part, kept, plan.geometry)
            sizes = scales_of(target_before, before, target) if method.solves else torch.ones(1)
            inputs = torch.cat(rows).unflatten(0, CALIBRATION.shape) / sizes
            moments.add(inputs.flatten(0, 1))
            torch.testing.assert_close(total.mean[columns], moments.mean, rtol=1e-3, atol=1e-4)
            assert (found.fit.count, found.held_out.count) == (15 * 16, 5 * 16)
            torch.testing.assert_close(found.held_out.mean[columns], inputs[3::4].mean((0, 1)), rtol=1e-3, atol=1e-4)
            if not method.solves:
                continue
            torch.testing.assert_close(total.gram[columns], moments.gram, rtol=1e-3, atol=1e-4)
            bias = projection.bias
            for cross, stream in zip(total.cross.split(plan.geometry.hidden_size), (target_before, before), strict=True):
                wanted = (target - stream - (0 if bias is None else bias)) / sizes
                again = wanted.flatten(0, 1).T @ inputs.flatten(0, 1) / CALIBRATION.numel()
                torch.testing.assert_close(cross, again, rtol=1e-3, atol=1e-4)
            assert not torch.equal(target_before, before) or index <= 1
    assert checked >= 4


@torch.no_grad()
def test_the_targets_of_a_repair_are_not_rounded_to_a_long_residual_stream(monkeypatch):
    """Where the stream is far longer than what is added to it, bfloat16 keeps little of the difference of two streams."""
    model, seen, method = tiny_model().bfloat16(), [], REPAIRS["least_squares"]
    model.model.embed_tokens.weight.mul_(2000)
    watched = replace(method, heal=lambda evidence: seen.append(evidence) or method.heal(evidence))
    monkeypatch.setitem(REPAIRS, "least_squares", watched)
    geometry, runner = geometry_of(model), LayerRunner.of(model)
    windows = CALIBRATION.clamp_min(2)  # without the padding token, whose embedding is zero
    before = runner.embed(windows)
    first = runner.observed(0, geometry.table.attention, before)
    sizes = scales_of(before.double(), first.after.double())
    inputs = (first.inputs / sizes).double().flatten(0, 1)[:, geometry.group_width :]
    exact, rounded = ((rows / sizes).double().flatten(0, 1).T @ inputs for rows in (first.outputs, first.after - before))
    plan = PruningPlan.dense(geometry).with_layer(0, LayerPlan((1,), tuple(range(96))))
    apply_plan(runner, plan, repair="least_squares", windows=windows)
    found = (seen[0].fit + seen[0].held_out).cross[: geometry.hidden_size].double() * windows.numel()
    assert (found - exact).norm() < 1e-3 * exact.norm() and (rounded - exact).norm() > 0.1 * exact.norm()


@torch.no_grad()
@each_architecture
def test_removed_sublayers_add_nothing_and_cost_no_parameters(changes):
    model = tiny_model(**changes)
    plan = without_sublayers(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan)
    torch.testing.assert_close(model(WINDOWS).logits, masked_model(plan, **changes)(WINDOWS).logits)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.total_params
    prompt = WINDOWS[:2, :6]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached, uncached = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@torch.no_grad()
@each_architecture
def test_the_bias_repair_keeps_the_mean_of_every_pruned_sublayers_answer(changes):
    """On the calibration windows, the mean of what a pruned sublayer adds equals that of its dense weights there."""
    model = tiny_model(**changes)
    plan = replace(random_plan(geometry_of(model)), output_bias=True)
    apply_plan(LayerRunner.of(model), plan, repair="bias", windows=CALIBRATION)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.total_params
    runner, dense = LayerRunner.of(model), LayerRunner.of(tiny_model(**changes))
    hidden = runner.embed(CALIBRATION)
    for index in range(runner.num_layers):
        for part in plan.geometry.table.sublayers:
            whole = dense.sublayer(index, part, hidden)
            after = runner.sublayer(index, part, hidden)
            torch.testing.assert_close((after - hidden).mean((0, 1)), (whole - hidden).mean((0, 1)), rtol=1e-3, atol=1e-4)
            hidden = after


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
        apply_plan(LayerRunner.of(model), plan, repair=repair, windows=windows("train", 60))
        measured[repair] = perplexity(model, windows("test", 40))
    assert measured["none"] > 1.5 * dense, "the plan must hurt, or this test proves nothing"
    assert measured["least_squares"] - dense < 0.7 * (measured["none"] - dense), (dense, measured)
