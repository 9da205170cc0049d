"""KV groups: a pruned attention is the dense one with the removed groups' o_proj columns zeroed."""

from __future__ import annotations

import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.families.slicing import output_columns, unit_indices
from LLMPruner.methods.gqa_aware import group_scores, select_units, slice_attention

WINDOWS = random_windows()
SCORES = st.lists(st.floats(-5, 5) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=20)


@torch.no_grad()
@each_architecture
def test_a_pruned_attention_equals_the_masked_dense_one(changes):
    pruned, masked = tiny_model(**changes), tiny_model(**changes)
    geometry = geometry_of(pruned)
    for groups in ([1], [0, geometry.num_kv_heads - 1]):
        gone = [group for group in range(geometry.num_kv_heads) if group not in groups]
        index = len(groups)  # layers 1 and 2
        slice_attention(pruned.model.layers[index], groups, geometry)
        if gone:
            masked.model.layers[index].self_attn.o_proj.weight[:, output_columns(geometry.table.attention, gone, geometry)] = 0
    torch.testing.assert_close(pruned(WINDOWS).logits, masked(WINDOWS).logits)
    assert not torch.equal(masked(WINDOWS).logits, tiny_model(**changes)(WINDOWS).logits)


@each_architecture
def test_the_ratio_of_query_to_kv_heads_holds(changes):
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    attention = model.model.layers[0].self_attn
    for keep in range(geometry.num_kv_heads, 0, -1):
        slice_attention(model.model.layers[0], list(range(keep)), geometry)
        assert attention.k_proj.out_features == attention.v_proj.out_features == keep * geometry.head_dim
        assert attention.q_proj.out_features == attention.o_proj.in_features == keep * geometry.q_per_kv * geometry.head_dim
        assert attention.num_key_value_groups == geometry.q_per_kv


@each_architecture
def test_a_group_owns_the_query_heads_that_read_its_kv_head(changes):
    """Changing one KV head's values moves exactly the o_proj inputs that output_columns names."""
    model = tiny_model(**changes)
    geometry = geometry_of(model)
    attention, seen = model.model.layers[0].self_attn, []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(WINDOWS)
        attention.v_proj.weight[unit_indices([1], geometry.head_dim)] += 1
        model(WINDOWS)
    moved = (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero().flatten()
    assert torch.equal(moved, output_columns(geometry.table.attention, [1], geometry))


@given(st.integers(1, 5), st.integers(1, 5))
def test_group_scores_sum_the_columns_that_unit_indices_names(groups, width):
    columns = torch.randn(groups * width, dtype=torch.float64)
    expected = [columns[unit_indices([group], width)].sum() for group in range(groups)]
    torch.testing.assert_close(group_scores(columns, groups), torch.stack(expected))


@given(SCORES, st.data())
def test_selection_keeps_the_highest_scores_in_ascending_order(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    kept = select_units(scores, keep)
    gone = set(range(len(scores))) - set(kept)
    assert len(kept) == keep and list(kept) == sorted(set(kept))
    assert all(scores[unit] >= scores[other] for unit in kept for other in gone)
    assert all(unit < other for unit in kept for other in gone if scores[unit] == scores[other])
