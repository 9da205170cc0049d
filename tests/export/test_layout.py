"""The layout: plans that foreign loaders take, and tensors padded to them with zeros that change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from LLMPruner.errors import UsageError
from LLMPruner.export.layout import ZERO_CHANNELS, counted, filled, is_uniform, laid_out, stock
from LLMPruner.families.family import rope_settings
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan, expected_shapes
from tests.conftest import each_architecture, random_plan, tiny_model
from tests.export.test_hf import logits, pruned

GEOMETRY = Geometry(300, 64, 96, 4, 8, 2, 8)
DENSE = PruningPlan.dense(GEOMETRY)


def alike(groups: int, channels: int, geometry: Geometry = GEOMETRY) -> PruningPlan:
    """A plan whose layers are all of one shape."""
    return PruningPlan(geometry, (LayerPlan(tuple(range(groups)), tuple(range(channels))),) * geometry.num_layers)


def test_a_removed_sublayer_is_filled_with_one_group_or_a_few_channels_and_nothing_else_changes():
    plan = random_plan(GEOMETRY)
    assert filled(plan) == plan
    gone = plan.with_layer(1, LayerPlan((), (3, 5))).with_layer(2, LayerPlan((1,), ()))
    assert filled(gone).layers[1] == LayerPlan((0,), (3, 5))
    assert filled(gone).layers[2] == LayerPlan((1,), tuple(range(ZERO_CHANNELS)))
    assert filled(gone).layers[0] == plan.layers[0] and filled(gone).layers[3] == plan.layers[3]
    narrow = PruningPlan(replace(GEOMETRY, intermediate_size=8), (LayerPlan((0,), ()),) * 4)
    assert filled(narrow).channel_counts == (8,) * 4, "no more channels than the dense model has"


def test_a_stock_layout_is_as_wide_as_the_widest_layer():
    plan = DENSE
    for index, (groups, channels) in enumerate(((1, 30), (1, 50), (1, 7), (1, 40))):
        plan = plan.with_layer(index, LayerPlan(tuple(range(groups)), tuple(range(channels))))
    layout = stock(plan)
    assert layout.is_dense and (layout.geometry.num_kv_heads, layout.geometry.intermediate_size) == (1, 50)
    assert (layout.geometry.num_heads, layout.geometry.head_dim, layout.geometry.hidden_size) == (4, 8, 64)
    assert not layout.geometry.attention_bias and not layout.geometry.mlp_bias


def test_a_stock_layout_has_the_biases_that_some_layer_has_and_heads_that_a_llama_with_biases_takes():
    geometry = replace(GEOMETRY, num_heads=8, num_kv_heads=8)
    plan = replace(alike(3, 50, geometry), output_bias=True)
    layout = stock(plan)
    assert layout.geometry.attention_bias and layout.geometry.mlp_bias
    assert layout.geometry.num_kv_heads == 4, "3 heads do not divide 64, and only a Mistral, without biases, may have them"
    assert stock(replace(plan, output_bias=False)).geometry.num_kv_heads == 3
    assert not stock(replace(alike(8, 50, geometry), output_bias=True)).geometry.attention_bias, "nothing of it is pruned"


def test_biases_that_no_stock_llama_can_have_are_refused():
    geometry = Geometry(300, 7, 96, 2, 6, 3, 8)  # 2 query heads a group never divide a width of 7
    with pytest.raises(UsageError, match="choose the hf export alone"):
        stock(replace(alike(1, 50, geometry), output_bias=True))


def test_only_layers_all_alike_and_without_new_biases_are_uniform():
    assert is_uniform(DENSE) and is_uniform(alike(1, 50))
    assert not is_uniform(alike(1, 50).with_layer(2, LayerPlan((0,), tuple(range(51)))))
    assert not is_uniform(replace(alike(1, 50), output_bias=True))
    assert not is_uniform(PruningPlan(GEOMETRY, (LayerPlan((0,), ()),) * 4)), "no loader knows a layer without an MLP"


def test_what_stands_for_removed_sublayers_is_not_counted():
    plan = random_plan(GEOMETRY)
    assert counted(plan, filled(plan)) == plan.total_params and counted(plan, stock(plan)) == stock(plan).total_params
    gone = plan.with_layer(1, LayerPlan((), plan.layers[1].channels))
    assert counted(gone, filled(gone)) == gone.total_params < filled(gone).total_params


@each_architecture
@pytest.mark.parametrize("repair", ["none", "bias"])
@pytest.mark.parametrize("arrange", [filled, stock])
def test_every_tensor_of_the_layout_is_the_models_own_and_zeros(changes, repair, arrange):
    loaded = pruned(None, repair=repair, removed=True, **changes)
    layout, state = arrange(loaded.plan), loaded.model.state_dict()
    found = dict(laid_out(loaded, layout))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected_shapes(layout)
    for name, tensor in found.items():
        inside = torch.zeros(tensor.shape, dtype=torch.bool)
        if name in state:
            corner = tuple(slice(size) for size in state[name].shape)
            inside[corner] = True
            assert tensor[corner].equal(state[name])
        assert not tensor[~inside].any() and tensor.dtype == loaded.model.dtype and not tensor.requires_grad
    own = state.keys() - ({"lm_head.weight"} if changes.get("tie_word_embeddings") else set())
    assert own <= found.keys(), "nothing of the model is left out"


@each_architecture
def test_the_laid_out_tensors_are_the_same_function(changes):
    loaded = pruned(None, removed=True, **changes)
    layout = stock(loaded.plan)
    sizes = {
        "num_attention_heads": layout.geometry.num_heads,
        "num_key_value_heads": layout.geometry.num_kv_heads,
        "intermediate_size": layout.geometry.intermediate_size,
    }
    stranger = tiny_model(seed=9, **changes | sizes)
    missing, unexpected = stranger.load_state_dict(dict(laid_out(loaded, layout)), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected and type(stranger) is LlamaForCausalLM
    assert torch.allclose(logits(stranger), logits(loaded.model), atol=1e-5)


def test_named_tensors_come_alone_and_in_their_order():
    loaded = pruned(None)
    names = ["model.norm.weight", "model.layers.3.mlp.down_proj.weight"]
    assert [name for name, _ in laid_out(loaded, filled(loaded.plan), names)] == names
    assert [name for name, _ in laid_out(loaded, filled(loaded.plan))] == list(expected_shapes(filled(loaded.plan)))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0}, "rope_theta": 1.0},
            {"rope_type": "linear", "rope_theta": 7.0},
        ),
    ],
)
def test_rotary_settings_of_transformers_4_and_5_are_worded_alike(config, settings):
    assert rope_settings(config) == settings
