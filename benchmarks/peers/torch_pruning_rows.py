"""torch-pruning's rows of quality.json: query heads and MLP channels of a Llama, by magnitude and by Taylor importance."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch_pruning as tp
from common import Peer, count_parameters, run


def ratios(model: Any, ratio: float) -> tuple[float, float]:
    """The tool's `head_pruning_ratio` and `pruning_ratio` (of MLP channels) that together remove `ratio` of the model.

    Heads take the model's ratio, as far as the tool can; channels take the rest. The tool rounds removed heads up and kept
    channels down: half a unit less keeps a float error from losing one more.
    """
    config = model.config
    per_group = config.num_attention_heads // config.num_key_value_heads
    # It takes as many query heads from every KV head and leaves K and V whole. Down to one query head per KV head it
    # no longer sees grouped queries, would cut K and V too, and so drops the whole group: two must stay.
    taken = max(0, min(math.ceil(ratio * per_group), per_group - 2))
    heads = taken * config.num_key_value_heads
    from_heads = heads * 2 * (config.hidden_size // config.num_attention_heads) * config.hidden_size  # q's rows, o's columns
    per_layer = ratio * count_parameters(model) / config.num_hidden_layers - from_heads
    channels = math.ceil(per_layer / (3 * config.hidden_size))
    return max(0.0, (heads - 0.5) / config.num_attention_heads), (channels - 0.5) / config.intermediate_size


def prune(model: Any, ratio: float, importance: Any) -> Any:
    """Every layer alike, as in the tool's own Llama example, but the hidden size is left alone: heads and MLP only."""
    config, total = model.config, count_parameters(model)
    num_heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        num_heads[attention.q_proj] = config.num_attention_heads
        num_heads[attention.k_proj] = num_heads[attention.v_proj] = config.num_key_value_heads
    head_ratio, channel_ratio = ratios(model, ratio)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=torch.zeros(1, 8, dtype=torch.long),
        importance=importance,
        pruning_ratio=channel_ratio,
        head_pruning_ratio=head_ratio,
        num_heads=num_heads,
        out_channel_groups={},  # the default is one dict that all pruners of a process share
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.model.embed_tokens, model.lm_head],
    )
    pruner.step()
    adopt_shapes(model)
    if total - count_parameters(model) < ratio * total:
        raise RuntimeError(f"torch-pruning removed {total - count_parameters(model)} parameters: fewer than {ratio} of {total}")
    return model


def adopt_shapes(model: Any) -> None:
    """Tell the modules and the config their new sizes, as the tool's own Llama example does."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.hidden_size = attention.q_proj.out_features
        attention.num_heads = attention.hidden_size // attention.head_dim
        attention.num_key_value_groups = attention.num_heads // attention.num_key_value_heads
    model.config.num_attention_heads = attention.num_heads
    model.config.intermediate_size = layer.mlp.gate_proj.out_features


def magnitude(model: Any, ratio: float, windows: torch.Tensor) -> Any:
    """Squared weights of a group."""
    return prune(model, ratio, tp.importance.GroupMagnitudeImportance(p=2))


def taylor(model: Any, ratio: float, windows: torch.Tensor) -> Any:
    """Weights times the gradients of the loss, summed over the windows."""
    for window in windows:
        model(input_ids=window[None], labels=window[None]).loss.backward()
    model = prune(model, ratio, tp.importance.GroupTaylorImportance())
    model.zero_grad(set_to_none=True)
    return model


PEERS = {
    "torch-pruning-magnitude": Peer(magnitude, calibrated=False),
    "torch-pruning-taylor": Peer(taylor, calibrated=True),
}

if __name__ == "__main__":
    sys.exit(run(__doc__, PEERS))
