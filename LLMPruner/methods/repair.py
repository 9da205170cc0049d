"""Closed-form repair: the output weights of what a sublayer keeps are solved again, so that it answers as it did dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads REPAIRS and must not wait for torch
    import torch

RIDGE = 0.01  # pull towards the original weights, relative to the mean diagonal of the kept Gram matrix


class Gram:
    """The second moment `X'X / n` of a sublayer's inputs, gathered batch by batch in float32."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs `(tokens, columns)`."""
        rows = inputs.float()
        product = rows.T @ rows
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.count += rows.shape[0]

    @property
    def matrix(self) -> torch.Tensor:
        """`(columns, columns)`, float32. Raises ValueError before any input was added."""
        if self._sum is None:
            raise ValueError("no input was added to the Gram matrix")
        return self._sum / self.count


def least_squares(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, *, ridge: float = RIDGE) -> torch.Tensor:
    """Output weights for the kept input columns that best reproduce `weight` on inputs with the given Gram matrix.

    Minimizes E|W x - V x_S|^2 + mu |V - W_S|^2 over V, with x_S the kept inputs and mu = ridge * mean diag(H_SS):
    V = (W H_S + mu W_S)(H_SS + mu I)^-1. It never raises the error above that of V = W_S. (OSSCAR, Meng et al. 2024;
    ZipLM, Kurtic et al. 2023.)

    Args:
        weight: dense output weights `(hidden, columns)`.
        gram: `(columns, columns)`, the mean of x x' over the calibration tokens.
        kept: ascending column indices `(k,)`.
    Returns:
        `(hidden, k)` in the dtype of `weight`; solved in float64, because H is close to singular.
    """
    import torch

    solve_on = torch.device("cpu") if weight.device.type == "mps" else weight.device  # mps has no float64
    kept = kept.to(solve_on)
    wide = weight.to(solve_on, torch.float64)
    gram = gram.to(solve_on, torch.float64)
    original = wide[:, kept]
    system = gram[kept][:, kept]
    mu = ridge * system.diagonal().mean()
    if not mu > 0:  # the kept inputs were all zero: nothing to solve for
        return weight[:, kept.to(weight.device)].clone()
    system.diagonal().add_(mu)
    right = wide @ gram[:, kept] + mu * original
    factor, failed = torch.linalg.cholesky_ex(system)
    solved = torch.cholesky_solve(right.T, factor).T
    if failed.item():  # rounding in the Gram matrix outweighs the ridge
        solved = torch.linalg.lstsq(system, right.T).solution.T
    return solved.to(weight.device, weight.dtype)


def output_error(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, solved: torch.Tensor) -> float:
    """Mean squared output error E|W x - V x_S|^2 of `solved` on inputs with the given Gram matrix."""
    difference = weight.double().clone()
    difference[:, kept] -= solved.double()
    return ((difference @ gram.double()) * difference).sum().item()


Solver = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]

# What a repair computes from (weight, gram, kept); None leaves the sliced weights as they are.
REPAIRS: dict[str, Solver | None] = {"least_squares": least_squares, "none": None}
