"""The store: the model's own weights, asked for by layer; changes stay, and each is listed once."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.size import count_parameters
from LLMPruner.model.store import ResidentStore
from LLMPruner.plan import expected_shapes

WINDOWS = random_windows()


@each_architecture
def test_the_weights_are_those_of_the_plan_each_once(changes):
    model = tiny_model(**changes)
    plan = random_plan(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan)
    found = list(ResidentStore(model).tensors())
    assert {name: tuple(tensor.shape) for name, tensor in found} == expected_shapes(plan) and len(found) == len(dict(found))
    assert sum(tensor.numel() for _, tensor in found) == count_parameters(model)
    assert not any(tensor.requires_grad for _, tensor in found)
    state = model.state_dict()
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in found), "no copies"


def test_what_is_done_to_a_layer_is_kept():
    model = tiny_model()
    store = ResidentStore(model)
    before = model(WINDOWS).logits
    with store.layer(2) as layer, torch.no_grad():
        assert layer is model.model.layers[2]
        layer.mlp.down_proj.weight.zero_()
    assert not model.model.layers[2].mlp.down_proj.weight.any() and not torch.equal(model(WINDOWS).logits, before)


def test_it_knows_the_model_and_embeds_as_it_does():
    model = tiny_model()
    store = ResidentStore(model)
    assert store.geometry == geometry_of(model) and store.num_layers == 4
    assert store.device == model.device and store.head is model.lm_head and store.final_norm is model.model.norm
    assert torch.equal(store.embed(WINDOWS), model.model.embed_tokens(WINDOWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_the_models_and_made_once_a_length_and_precision(dtype):
    model = tiny_model()
    store, made = ResidentStore(model), []
    model.model.rotary_emb.register_forward_hook(lambda *_: made.append(1))
    hidden = store.embed(WINDOWS).detach().to(dtype)
    tables = store.rotary(hidden)
    for found, wanted in zip(tables, model.model.rotary_emb(hidden, torch.arange(12).unsqueeze(0)), strict=True):
        assert torch.equal(found, wanted) and found.dtype == dtype
    made.clear()
    assert store.rotary(hidden[:1]) is tables and not made, "whatever the batch"
    assert store.rotary(hidden[:, :5])[0].shape[1] == 5 and len(made) == 1
    other = torch.float16 if dtype == torch.float32 else torch.float32
    assert store.rotary(hidden.to(other))[0].dtype == other and store.rotary(hidden) is tables


def test_eager_attention_is_switched_off_for_it_is_causal_only_with_a_mask():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ResidentStore(model)
    assert model.config._attn_implementation == "sdpa"


def test_whether_autograd_follows_the_weights_is_said_for_all_of_them():
    model = tiny_model()
    store = ResidentStore(model)
    for wanted in (False, True):
        store.requires_grad_(wanted)
        assert {weight.requires_grad for weight in model.parameters()} == {wanted}
