"""Optimal Brain Surgeon: what removing a unit costs once everything kept has been refitted.

Units go one batch after another; after each, the kept weights and the inverse Gram matrix are updated, so later scores
know what is gone. (Hassibi & Stork 1992; ZipLM, Kurtic et al. 2023; OSSCAR, Meng et al. 2024; SlimGPT, Ling et al. 2024.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from LLMPruner.model.device import float64

if TYPE_CHECKING:  # importance.criteria reads this module and must not wait for torch
    import torch

DAMPING = 0.01  # of the mean diagonal, added to the Gram matrix before it is inverted
ROUNDS = 96  # at most so many updates a sublayer: units that go between two of them are scored together


def removal_costs(weight: torch.Tensor, gram: torch.Tensor, width: int) -> torch.Tensor:
    """The rise of the sublayer's mean squared output error when each unit goes, in the order OBS would take them.

    The order is what counts for selection: scores ascend in it, so keeping the best-scored units of any number is the
    nested choice of OBS.

    Args:
        weight: output weights `(hidden, columns)`.
        gram: mean of x x' over the calibration tokens, `(columns, columns)`.
        width: adjacent columns of one unit (1 for a channel, group_width for a KV group).
    Returns:
        float32 `(columns // width,)` on the CPU; computed in float64.
    """
    import torch

    left = float64(weight.detach()).clone()
    system = float64(gram).clone()
    system.diagonal().add_(DAMPING * system.diagonal().mean().clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    units = weight.shape[1] // width
    batch = -(-units // ROUNDS)
    alive = torch.ones(units, dtype=torch.bool, device=left.device)
    costs = torch.zeros(units, device=left.device)
    while alive.any():
        now = _unit_costs(left, inverse, width).masked_fill(~alive, torch.inf)
        going = torch.topk(now, min(batch, int(alive.sum())), largest=False).indices
        floor = torch.nextafter(costs.max(), torch.full_like(costs.max(), torch.inf))  # who goes later ranks higher
        costs[going] = torch.maximum(now[going].float(), floor)
        alive[going] = False
        columns = (going.unsqueeze(1) * width + torch.arange(width, device=going.device)).flatten()
        _eliminate(left, inverse, columns)
    return costs.cpu()


def _unit_costs(weight: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    """tr(W_g ([H^-1]_gg)^-1 W_g') of every unit, `(units,)`; of eliminated ones the value means nothing."""
    import torch

    if width == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
    units = weight.shape[1] // width
    blocks = torch.stack([inverse[u * width : (u + 1) * width, u * width : (u + 1) * width] for u in range(units)])
    columns = weight.T.reshape(units, width, -1)  # (units, width, hidden)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def _eliminate(weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
    """Remove `columns` and refit the rest, in place; the rows and columns of what is gone become the identity's."""
    import torch

    rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (k, columns)
    weight.addmm_(weight[:, columns], rows, alpha=-1)
    inverse.addmm_(inverse[:, columns], rows, alpha=-1)
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
