"""Units to modules: the rows and columns of the kept units, in storage of their own, or nothing where none is kept."""

from __future__ import annotations

import pytest
import torch
from conftest import each_architecture, geometry_of, random_plan, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from LLMPruner.families.slicing import (
    is_removed,
    output_columns,
    output_projection,
    shape_layer,
    slice_linear,
    slice_sublayer,
    unit_indices,
)
from LLMPruner.plan import LayerPlan


@given(st.integers(1, 6), st.integers(1, 5))
def test_unit_indices_of_all_units_are_all_rows(units, width):
    assert torch.equal(unit_indices(range(units), width), torch.arange(units * width))


def test_unit_indices_are_each_units_neighbours():
    assert unit_indices([0, 2], 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("bias", [True, False])
def test_a_sliced_linear_owns_its_storage_and_keeps_dtype_and_grad_flag(bias):
    linear = nn.Linear(6, 8, bias=bias).to(torch.bfloat16).requires_grad_(False)
    rows, columns = torch.tensor([1, 4, 7]), torch.tensor([0, 5])
    for choice in ({"rows": rows}, {"columns": columns}, {"rows": rows, "columns": columns}):
        sliced = slice_linear(linear, **choice)
        kept_rows, kept_columns = choice.get("rows", torch.arange(8)), choice.get("columns", torch.arange(6))
        assert torch.equal(sliced.weight, linear.weight[kept_rows][:, kept_columns])
        assert (sliced.out_features, sliced.in_features) == (len(kept_rows), len(kept_columns))
        assert (sliced.bias is not None) == bias and not sliced.weight.requires_grad
        if bias:
            assert torch.equal(sliced.bias, linear.bias[kept_rows])
        for tensor in sliced.parameters():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert tensor.dtype == torch.bfloat16


@each_architecture
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_sliced_sublayer_has_its_units_rows_and_columns_and_the_rest_of_the_layer_stays(changes, name):
    model, dense = tiny_model(**changes), tiny_model(**changes)
    geometry = geometry_of(model)
    sublayer, other = geometry.table.sublayer(name), geometry.table.sublayer({"attention": "mlp", "mlp": "attention"}[name])
    layer, whole = model.model.layers[1], dense.model.layers[1]
    kept = [1, geometry.units(name) - 1] if geometry.units(name) > 2 else [1]
    slice_sublayer(layer, sublayer, kept, geometry)
    sliced, full = getattr(layer, sublayer.attribute), getattr(whole, sublayer.attribute)
    for part in sublayer.inputs:
        rows = unit_indices(kept, geometry.segment(part))
        for found, wanted in zip(getattr(sliced, part.name).parameters(), getattr(full, part.name).parameters(), strict=True):
            assert torch.equal(found, wanted[rows])
    columns = output_columns(sublayer, kept, geometry)
    found, wanted = output_projection(layer, sublayer), output_projection(whole, sublayer)
    assert found is getattr(sliced, sublayer.output.name) and torch.equal(found.weight, wanted.weight[:, columns])
    assert found.bias is wanted.bias is None or torch.equal(found.bias, wanted.bias)
    rest = zip(getattr(layer, other.attribute).parameters(), getattr(whole, other.attribute).parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in rest)


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_sublayer_without_units_is_a_module_without_weights_that_adds_nothing(name):
    model = tiny_model()
    geometry, layer = geometry_of(model), model.model.layers[1]
    sublayer = geometry.table.sublayer(name)
    assert not is_removed(getattr(layer, sublayer.attribute))
    slice_sublayer(layer, sublayer, (), geometry)
    removed = getattr(layer, sublayer.attribute)
    assert is_removed(removed) and not list(removed.parameters())
    hidden = torch.randn(2, 3, geometry.hidden_size)
    output = removed(hidden_states=hidden)
    output = output[0] if name == "attention" else output
    assert output.shape == hidden.shape and not output.any()


@each_architecture
@pytest.mark.parametrize("seed", range(2))
def test_a_shaped_layer_has_the_shapes_that_slicing_gives(changes, seed):
    sliced, shaped = tiny_model(**changes), tiny_model(**changes)
    geometry = geometry_of(sliced)
    plan = random_plan(geometry, seed).with_layer(2, LayerPlan((), (3,))).with_layer(3, LayerPlan((0,), ()))
    for index, (layer, empty) in enumerate(zip(sliced.model.layers, shaped.model.layers, strict=True)):
        for sublayer in geometry.table.sublayers:
            slice_sublayer(layer, sublayer, plan.layers[index].kept(sublayer.name), geometry)
        shape_layer(empty, plan, index)
        assert [type(module) for module in layer.modules()] == [type(module) for module in empty.modules()]
        found, wanted = ({name: w.shape for name, w in one.named_parameters()} for one in (empty, layer))
        assert found == wanted
        widths = [getattr(one.mlp, "intermediate_size", None) for one in (empty, layer)]
        assert widths == [len(plan.layers[index].channels) or None] * 2, "the module repeats its width"
