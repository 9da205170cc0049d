"""What stands where a whole sublayer was removed: it adds nothing to the residual stream, and costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RemovedAttention(nn.Module):
    """No attention: no weights, and no entry in the KV cache."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Zeros `(batch, seq_len, hidden)` and no attention weights."""
        return torch.zeros_like(hidden_states), None


class RemovedMLP(nn.Module):
    """No MLP: no weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros `(batch, seq_len, hidden)`."""
        return torch.zeros_like(hidden_states)
