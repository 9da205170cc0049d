"""The plan: it survives JSON, refuses what is not a plan, and counts parameters as the model itself does."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
from conftest import each_architecture, geometry_of, random_plan, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.errors import UsageError
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import build_empty
from LLMPruner.model.size import count_parameters
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan, expected_shapes, removed_prefixes

GEOMETRY = Geometry(
    vocab_size=10, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2, mlp_bias=True
)
CONFIG = tiny_config().to_dict()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_a_plan_survives_json(kv_heads, q_per_kv, width, layers, seed, flag):
    geometry = Geometry(10, 8, width, layers, kv_heads * q_per_kv, kv_heads, 2, flag, not flag, flag, 99)
    plan = random_plan(geometry, seed)
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("groups", "channels", "complaint"),
    [
        ((1, 0), (0,), "KV group indices must ascend"),
        ((0, 0), (0,), "KV group indices must ascend"),
        ((0, 2), (0,), r"ascend within 0\.\.1"),
        ((-1, 0), (0,), "ascend within"),
        ((0,), (0, 6), r"channel indices must ascend within 0\.\.5"),
        ((0,), (0, True), "channel indices must be integers"),
        ((0.0,), (0,), "KV group indices must be integers"),
    ],
)
def test_a_layer_that_is_not_a_selection_is_refused(groups, channels, complaint):
    with pytest.raises(UsageError, match="layer 1.*" + complaint):
        PruningPlan.dense(GEOMETRY).with_layer(1, LayerPlan(groups, channels))


def test_a_plan_of_another_depth_is_refused():
    with pytest.raises(UsageError, match="plan has 1 layers, the model has 2"):
        PruningPlan(GEOMETRY, PruningPlan.dense(GEOMETRY).layers[:1])


def _broken(**changes) -> str:
    return json.dumps(json.loads(PruningPlan.dense(GEOMETRY).to_json()) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "3",
        "{}",
        _broken(layers=3),
        _broken(layers=[{"kv_groups": [0]}] * 2),
        _broken(layers=[{"kv_groups": 0, "channels": [0]}] * 2),
        _broken(layers=[{"kv_groups": ["0"], "channels": [0]}] * 2),
        _broken(geometry={"hidden_size": 8}),
        _broken(geometry=dataclasses.asdict(GEOMETRY) | {"surprise": 1}),
        _broken(geometry=dataclasses.asdict(GEOMETRY) | {"num_heads": 3}),
        _broken(geometry=dataclasses.asdict(GEOMETRY) | {"hidden_size": 8.0}),
        _broken(geometry=dataclasses.asdict(GEOMETRY) | {"head_dim": 0}),
    ],
)
def test_a_text_that_is_not_a_plan_is_refused(text):
    with pytest.raises(UsageError, match="not a pruning plan"):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": "8"},
        {"num_attention_heads": 7},
        {"vocab_size": -1},
    ],
)
def test_a_config_that_is_not_a_llama_is_refused(changes):
    with pytest.raises(UsageError, match="not a usable Llama"):
        Geometry.from_config(CONFIG | changes)


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_config_without_a_size_is_refused_by_name(missing):
    with pytest.raises(UsageError, match=missing):
        Geometry.from_config({name: value for name, value in CONFIG.items() if name != missing})


def test_an_old_config_without_kv_heads_and_head_dim_means_multi_head_attention():
    config = {name: value for name, value in CONFIG.items() if name not in ("num_key_value_heads", "head_dim")}
    geometry = Geometry.from_config(config)
    assert (geometry.q_per_kv, geometry.num_kv_heads, geometry.head_dim) == (1, 8, 8)


@each_architecture
def test_counts_equal_the_dense_models(changes):
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    assert geometry.dense_params == count_parameters(model)
    assert PruningPlan.dense(geometry).is_dense and PruningPlan.dense(geometry).removed_params == 0


@pytest.mark.parametrize("seed", range(3))
@each_architecture
def test_counts_equal_the_pruned_models(changes, seed):
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    plan = random_plan(geometry, seed)
    apply_plan(LayerRunner.of(model), plan)
    assert plan.total_params == count_parameters(model) == geometry.dense_params - plan.removed_params
    empty = build_empty(model.config, plan)
    empty.tie_weights()
    assert count_parameters(empty) == plan.total_params
    assert not plan.is_dense


def test_a_sublayer_may_be_gone_but_not_the_first_attention():
    geometry = Geometry(10, 8, 6, 3, 4, 2, 2, attention_bias=True, mlp_bias=True)
    plan = PruningPlan.dense(geometry)
    none = plan.with_layer(2, LayerPlan((), ()))
    lost = geometry.sublayer_params("attention") + geometry.sublayer_params("mlp")
    lost += 2 * geometry.hidden_size  # the biases of o and down
    assert none.removed_params == lost and PruningPlan.from_json(none.to_json()) == none
    with pytest.raises(UsageError, match="layer 0 keeps no KV group"):
        plan.with_layer(0, LayerPlan((), (0,)))


def test_output_biases_count_where_a_sublayer_was_pruned_and_had_none():
    geometry = Geometry(10, 8, 6, 3, 4, 2, 2)
    plan = replace(PruningPlan.dense(geometry), output_bias=True)
    assert plan.total_params == geometry.dense_params
    pruned = plan.with_layer(1, LayerPlan((0,), (0, 1, 2, 3, 4, 5)))
    assert pruned.removed_params == geometry.unit_params("attention") - geometry.hidden_size
    biases = [pruned.has_output_bias(name, index) for name, index in (("attention", 1), ("mlp", 1), ("attention", 0))]
    assert biases == [True, False, False] and pruned.adds_bias
    assert PruningPlan.from_json(pruned.to_json()).output_bias


@each_architecture
def test_the_parts_of_a_sublayer_add_up_to_its_tensors(changes):
    model = tiny_model(**changes)
    geometry, layer = geometry_of(model), model.model.layers[1]
    for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
        assert geometry.sublayer_params(name) + geometry.whole_params(name) == count_parameters(module)
        assert geometry.sublayer_params(name) == geometry.units(name) * geometry.unit_params(name)


@each_architecture
def test_the_expected_shapes_are_those_of_the_pruned_model(changes):
    model = tiny_model(**changes)
    plan = random_plan(geometry_of(model), 1).with_layer(2, LayerPlan((), (0, 5)))
    plan = replace(plan.with_layer(3, LayerPlan((0,), ())), output_bias=True)
    found = {name: tuple(tensor.shape) for name, tensor in build_empty(model.config, plan).state_dict().items()}
    if plan.geometry.tied_embeddings:
        del found["lm_head.weight"]
    assert expected_shapes(plan) == found
    removed = removed_prefixes(plan)
    assert removed == ("model.layers.2.self_attn.", "model.layers.3.mlp.")
    assert not any(name.startswith(removed) for name in expected_shapes(plan))
    dense = expected_shapes(PruningPlan.dense(plan.geometry))
    kept = {name for name in dense if not name.startswith(removed)}
    assert kept <= expected_shapes(plan).keys(), "nothing else is missing"


def test_the_family_is_stated_where_it_is_not_llama_and_one_without_a_table_is_refused():
    """Files of before there was another family have none, and a Llama's are still written so."""
    mistral = replace(GEOMETRY, family="mistral")
    for geometry in (GEOMETRY, mistral):
        text = PruningPlan.dense(geometry).to_json()
        assert ("family" in json.loads(text)["geometry"]) == (geometry is mistral)
        assert PruningPlan.from_json(text).geometry == geometry
    with pytest.raises(UsageError, match="no table of the family 'gpt2': there are llama, mistral"):
        replace(GEOMETRY, family="gpt2")
    with pytest.raises(UsageError, match="model_type 'gpt2' is of no family"):
        Geometry.from_config(CONFIG | {"model_type": "gpt2"})
    assert Geometry.from_config({name: value for name, value in CONFIG.items() if name != "model_type"}).family == "llama"
