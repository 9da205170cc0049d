"""MLP channels: a pruned MLP is the dense one with the removed channels' down_proj columns zeroed."""

from __future__ import annotations

import torch
from conftest import each_architecture, geometry_of, random_windows, tiny_model

from LLMPruner.methods.mlp import slice_mlp

WINDOWS = random_windows()


@torch.no_grad()
@each_architecture
def test_a_pruned_mlp_equals_the_masked_dense_one(changes):
    pruned, masked = tiny_model(**changes), tiny_model(**changes)
    for index, channels in ((1, list(range(0, 96, 3))), (2, [95])):
        gone = [channel for channel in range(96) if channel not in channels]
        slice_mlp(pruned.model.layers[index], channels, geometry_of(pruned))
        masked.model.layers[index].mlp.down_proj.weight[:, gone] = 0
    torch.testing.assert_close(pruned(WINDOWS).logits, masked(WINDOWS).logits)
    assert not torch.equal(masked(WINDOWS).logits, tiny_model(**changes)(WINDOWS).logits)


def test_all_three_projections_and_the_stated_width_agree():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    slice_mlp(model.model.layers[0], [3, 5, 90], geometry_of(model))
    assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features == mlp.intermediate_size == 3
