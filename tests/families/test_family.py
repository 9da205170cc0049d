"""The table of a family is all that pruning knows of a layer: other families are other data, and no more code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, random_plan, random_windows, tiny_config
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from LLMPruner.families.family import Family
from LLMPruner.families.llama import ATTENTION, FAMILIES, LLAMA, MISTRAL, MLP, QWEN2, QWEN3, family_of
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.size import count_parameters
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan, expected_shapes
from LLMPruner.trainer.finetuner import adapters
from LLMPruner.training_config import LoraConfig

WINDOWS, CALIBRATION = random_windows(), random_windows(60, 16, seed=1)

# A family that the package does not know, as data alone.
GEMMA2 = Family(
    "gemma2",
    "Gemma2",
    replace(ATTENTION, wraps=("post_attention_layernorm",)),
    replace(MLP, norm="pre_feedforward_layernorm", wraps=("post_feedforward_layernorm",)),
)
# The kind of Gemma 2 that this tool could take: no sliding window, no soft caps.
PLAIN = {"layer_types": ["full_attention"] * 4, "attn_logit_softcapping": None, "final_logit_softcapping": None}


@dataclass(frozen=True)
class Kind:
    """A family and a stock model of it."""

    family: Family
    build: Callable[[], PreTrainedModel]


KINDS = {
    **{
        name: Kind(LLAMA, lambda changes=changes: LlamaForCausalLM(tiny_config(**changes)))
        for name, changes in ARCHITECTURES.items()
    },
    "mistral": Kind(MISTRAL, lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))),
    "qwen2": Kind(QWEN2, lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "qwen2 tied": Kind(QWEN2, lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": True}))),
    "qwen3": Kind(QWEN3, lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 12}))),
    "qwen3 biases": Kind(QWEN3, lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 12}, attention_bias=True))),
    "gemma2": Kind(GEMMA2, lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES | PLAIN | {"tie_word_embeddings": True}))),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request, monkeypatch) -> Kind:
    """One of the kinds, its family known to the package."""
    monkeypatch.setitem(FAMILIES, request.param.family.model_type, request.param.family)
    return request.param


def built(kind: Kind) -> PreTrainedModel:
    """A random float32 model whose biases and norms are not what they are in every new model."""
    torch.manual_seed(0)
    model = kind.build().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    return model


def geometry_of(model: PreTrainedModel) -> Geometry:
    return Geometry.from_config(model.config.to_dict())


def some_plan(geometry: Geometry) -> PruningPlan:
    """A random plan in which layer 2 has no attention and layer 3 no MLP."""
    plan = random_plan(geometry, seed=1)
    return plan.with_layer(2, LayerPlan((), plan.layers[2].channels)).with_layer(3, LayerPlan((1,), ()))


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


@torch.no_grad()
def masked(kind: Kind, plan: PruningPlan) -> PreTrainedModel:
    """The dense model, with zeros in the columns of o_proj and down_proj that belong to what the plan removes."""
    model = built(kind)
    for layer, kept in zip(model.model.layers, plan.layers, strict=True):
        for linear, units, count in (
            (layer.self_attn.o_proj, kept.kv_groups, plan.geometry.num_kv_heads),
            (layer.mlp.down_proj, kept.channels, plan.geometry.intermediate_size),
        ):
            columns = torch.arange(linear.in_features).view(count, -1)
            gone = [unit for unit in range(count) if unit not in units]
            linear.weight[:, columns[gone].flatten()] = 0
            if not units and linear.bias is not None:
                linear.bias.zero_()
    return model


def test_the_table_names_every_tensor_of_the_stock_model_with_its_shape(kind):
    model = built(kind)
    geometry = geometry_of(model)
    assert geometry.table is kind.family
    assert expected_shapes(PruningPlan.dense(geometry)) == shapes_of(model)


def test_the_parameters_are_those_of_the_stock_model(kind):
    model = built(kind)
    geometry = geometry_of(model)
    assert geometry.dense_params == count_parameters(model)
    for part in geometry.table.sublayers:
        owned = count_parameters(getattr(model.model.layers[0], part.attribute))
        assert geometry.sublayer_params(part.name) + geometry.whole_params(part.name) == owned


@torch.no_grad()
def test_the_runner_is_the_stock_model(kind):
    model = built(kind)
    runner = LayerRunner.of(model)
    hidden = runner.layers(runner.embed(WINDOWS))
    torch.testing.assert_close(runner.store.head(runner.store.final_norm(hidden)), model(WINDOWS).logits, rtol=1e-4, atol=1e-5)


def test_a_gate_gradient_summed_over_tokens_is_weight_times_gradient_of_its_column(kind):
    model, gates = built(kind), {}
    logits = model(WINDOWS).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    outputs = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    products = [[(linear.weight * linear.weight.grad).sum(0) for linear in pair] for pair in outputs]
    LayerRunner.of(model).gate_gradients(WINDOWS, lambda index, found: gates.setdefault(index, []).append(found))
    for index, wanted in enumerate(products):
        for side, product in enumerate(wanted):
            found = sum(batch[side].sum((0, 1)) for batch in gates[index])
            torch.testing.assert_close(found, product, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_sliced_model_is_the_masked_dense_one(kind):
    model = built(kind)
    plan = some_plan(geometry_of(model))
    dense = model(WINDOWS).logits
    apply_plan(LayerRunner.of(model), plan)
    torch.testing.assert_close(model(WINDOWS).logits, masked(kind, plan)(WINDOWS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(WINDOWS).logits, dense, atol=1e-3), "the plan must change something"


def test_a_sliced_model_has_the_plans_shapes_and_parameters(kind):
    model = built(kind)
    plan = some_plan(geometry_of(model))
    apply_plan(LayerRunner.of(model), plan)
    assert shapes_of(model) == expected_shapes(plan)
    assert plan.total_params == count_parameters(model) == plan.geometry.dense_params - plan.removed_params
    assert dict(LayerRunner.of(model).store.tensors()).keys() == expected_shapes(plan).keys()


@pytest.mark.parametrize("repair", ["bias", "least_squares"])
def test_a_repaired_model_has_the_plans_shapes_and_parameters(kind, repair):
    model = built(kind)
    plan = replace(some_plan(geometry_of(model)), output_bias=repair == "bias")
    apply_plan(LayerRunner.of(model), plan, repair=repair, windows=CALIBRATION)
    assert shapes_of(model) == expected_shapes(plan) and plan.total_params == count_parameters(model)


@torch.no_grad()
def test_a_repaired_model_is_nearer_to_the_dense_one_than_a_sliced_one(kind):
    repaired, sliced = built(kind), built(kind)
    geometry = geometry_of(repaired)
    kept = LayerPlan(tuple(range(geometry.num_kv_heads)), tuple(unit for unit in range(96) if unit % 4))
    plan, dense = PruningPlan(geometry, (kept,) * 4), repaired(WINDOWS).logits
    apply_plan(LayerRunner.of(sliced), plan)
    apply_plan(LayerRunner.of(repaired), plan, repair="least_squares", windows=CALIBRATION)
    healed, unhealed = ((model(WINDOWS).logits - dense).norm().item() for model in (repaired, sliced))
    assert healed < 0.97 * unhealed


@pytest.mark.parametrize("targets", [(True, True), (True, False), (False, True)], ids=["both", "attention", "mlp"])
def test_lora_adapts_the_tables_projections_and_no_other_module(kind, targets):
    model = built(kind)
    chosen = [part for part, wanted in zip(kind.family.sublayers, targets, strict=True) if wanted]
    config = LoraConfig(r=2, target_attention=targets[0], target_mlp=targets[1])
    with adapters(model, kind.family, config, seed=0) as adapted:
        found = {
            name.split(".lora_A")[0].split("model.model.model.")[-1]
            for name, _ in adapted.named_parameters()
            if ".lora_A" in name
        }
    linears = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == {name for name in linears if name.split(".")[2] in {part.attribute for part in chosen}}
    assert found == {
        f"layers.{index}.{part.attribute}.{projection.name}"
        for index in range(4)
        for part in chosen
        for projection in part.projections
    }


def test_the_model_type_of_an_export_is_its_familys_and_an_unknown_one_has_none():
    assert family_of("llama") is family_of("pruned_llama") is LLAMA and family_of("mistral") is MISTRAL
    assert family_of("gemma2") is family_of(None) is family_of("") is None


def test_a_sublayer_is_asked_for_by_name_and_the_output_is_the_last_projection():
    assert LLAMA.sublayer("attention") is LLAMA.attention and LLAMA.sublayer("mlp") is LLAMA.mlp
    assert [part.name for part in ATTENTION.projections] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [part.name for part in ATTENTION.projections if part.rotary] == ["q_proj", "k_proj"]
    with pytest.raises(KeyError):
        LLAMA.sublayer("norm")
