"""optipfair's rows of quality.json: MLP neurons by weights alone, by weights and activations, and whole layers."""

from __future__ import annotations

import math
import sys
from typing import Any

import optipfair
import torch
from common import Peer, count_parameters, run
from torch.utils.data import DataLoader


def batches(windows: torch.Tensor) -> DataLoader:
    """The windows as optipfair's examples pass text: batches of a dict."""
    return DataLoader([{"input_ids": window} for window in windows], batch_size=4)


def prune_mlp(model: Any, ratio: float, dataloader: DataLoader | None) -> Any:
    """The fewest channels per layer (the same in all) that remove `ratio`; neuron selection is the tool's default."""
    config = model.config
    per_channel = 3 * config.hidden_size * config.num_hidden_layers  # a row of gate and up, a column of down
    channels = math.ceil(ratio * count_parameters(model) / per_channel)
    # the tool rounds its percentage down to channels: half a channel more keeps a float error from losing one
    percentage = 100 * (channels + 0.5) / config.intermediate_size
    return optipfair.prune_model(model, pruning_percentage=percentage, dataloader=dataloader, show_progress=False)


def mlp_static(model: Any, ratio: float, windows: torch.Tensor) -> Any:
    """Weights only."""
    return prune_mlp(model, ratio, None)


def mlp_data(model: Any, ratio: float, windows: torch.Tensor) -> Any:
    """Weights times activation norms."""
    return prune_mlp(model, ratio, batches(windows))


def depth(model: Any, ratio: float, windows: torch.Tensor) -> Any:
    """The layers that change their input's direction least; as many whole layers as come nearest to `ratio`."""
    count = round(ratio * count_parameters(model) / count_parameters(model.model.layers[0]))
    scores = optipfair.analyze_layer_importance(model, batches(windows), show_progress=False)
    layers = sorted(sorted(scores, key=scores.get)[:count])
    print(f"layers removed: {layers}", flush=True)
    return optipfair.prune_model(model, pruning_type="DEPTH", layer_indices=layers, show_progress=False)


PEERS = {
    "optipfair-mlp": Peer(mlp_static, calibrated=False),
    "optipfair-mlp-data": Peer(mlp_data, calibrated=True),
    "optipfair-depth": Peer(depth, calibrated=True),
}

if __name__ == "__main__":
    sys.exit(run(__doc__, PEERS))
