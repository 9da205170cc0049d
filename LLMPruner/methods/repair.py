"""Closed-form repair: the output projection of what a sublayer keeps is solved again, so that the model answers as dense.

A repair is one function from a sublayer's `Evidence` to new output weights, and one entry in REPAIRS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from LLMPruner.model.device import float64

if TYPE_CHECKING:  # the command line reads REPAIRS and must not wait for torch
    import torch

    from LLMPruner.methods.moments import Moments

RIDGE = 0.01  # pull towards the original weights, relative to the mean diagonal of the kept Gram matrix
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # strengths that held-out windows choose from


@dataclass(frozen=True)
class Evidence:
    """What calibration tells a repair about one sublayer of the pruned model.

    `fit` and `held_out` are moments of the inputs to the output projection, all dense columns against the kept ones, over
    disjoint windows. Their targets are, side by side, the dense sublayer's output on the dense stream and what would also
    undo the drift of the residual stream: `(2 * hidden,)`. For a repair that does not solve, they are of the dense columns'
    means and mean squares only.
    """

    weight: torch.Tensor  # (hidden, columns), dense
    kept: torch.Tensor  # ascending column indices (k,)
    fit: Moments
    held_out: Moments


@dataclass(frozen=True)
class Healed:
    """New output weights `(hidden, k)` for the kept columns, what to add to the bias `(hidden,)`, and how they were chosen."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    choice: str = ""


def least_squares(evidence: Evidence) -> Healed:
    """Ridge regression for the output weights; its target and strength are chosen on the held-out windows.

    The target is the sublayer's own function, or a step from it towards the dense model's output or towards that and the
    residual stream's drift; the step's length minimizes the distance to the dense residual stream on the held-out windows.
    Sliced weights without a repair are a candidate as well, so too few tokens do no harm. The chosen setting is then solved
    on all windows.
    """
    weight, kept = evidence.weight.float(), evidence.kept.to(evidence.weight.device)
    original, hidden = weight[:, kept], weight.shape[0]
    gram, drift = evidence.held_out.gram[kept], evidence.held_out.cross[hidden:]
    unhealed = _distance(original, gram, drift)
    best = (unhealed, "none", 0.0, 0.0)
    targets, system = _equations(weight, evidence.fit, kept)
    for ridge in RIDGES:  # candidates in float32, which is twice as fast; what is chosen is solved in float64
        own, *others = _solve(targets, system, original, ridge)
        base = _distance(own, gram, drift)
        for name, other in zip(("dense", "drift"), others, strict=True):
            step = other - own
            curved = step @ gram
            curvature, slope = (curved * step).sum().item(), ((own @ gram - drift) * step).sum().item()
            share = min(max(-slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
            distance = base + 2 * share * slope + share**2 * curvature
            best = min(best, (distance, name if share else "own", share, ridge))
    _, name, share, ridge = best
    unrepaired = Healed(original.to(evidence.weight.dtype), choice="none")
    if name == "none":
        return unrepaired
    targets, system = _equations(float64(weight), evidence.fit + evidence.held_out, kept)
    own, dense, undrifted = _solve(targets, system, float64(original), ridge)
    healed = (own + share * ((undrifted if name == "drift" else dense) - own)).to(weight.device)
    # On few tokens the solution on all windows can be worse on the held-out ones; NaN is no better either.
    if _distance(healed.float(), gram, drift) <= unhealed:
        return Healed(healed.to(evidence.weight.dtype), choice=f"{name} {share:.2f} ridge {ridge:g}")
    return unrepaired


def _distance(weight: torch.Tensor, gram: torch.Tensor, drift: torch.Tensor) -> float:
    """Mean squared distance to the dense residual stream, up to a constant: `gram` E[x x'], `drift` E[y x']."""
    return ((weight @ gram - 2 * drift) * weight).sum().item()


def bias(evidence: Evidence) -> Healed:
    """FLAP's mean compensation (An et al. 2024): what the removed columns added on average goes into the bias."""
    import torch

    moments = evidence.fit + evidence.held_out
    gone = torch.ones(evidence.weight.shape[1], dtype=torch.bool, device=evidence.weight.device)
    kept = evidence.kept.to(gone.device)
    gone[kept] = False
    added = evidence.weight[:, gone].float() @ moments.mean[gone]
    return Healed(evidence.weight[:, kept], added.to(evidence.weight.dtype), choice="mean")


def solve_own(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, *, ridge: float = RIDGE) -> torch.Tensor:
    """Output weights for the kept input columns that best reproduce `weight` on inputs with the given Gram matrix.

    Minimizes E|W x - V x_S|^2 + mu |V - W_S|^2 over V, with x_S the kept inputs and mu = ridge * mean diag(H_SS):
    V = (W H_S + mu W_S)(H_SS + mu I)^-1. It never raises the error above that of V = W_S. (OSSCAR, Meng et al. 2024;
    ZipLM, Kurtic et al. 2023.)

    Args:
        weight: dense output weights `(hidden, columns)`.
        gram: `(columns, columns)`, the mean of x x' over the calibration tokens.
        kept: ascending column indices `(k,)`.
    Returns:
        `(hidden, k)` in the dtype of `weight`, float32 or float64.
    """
    gram, kept = gram.to(weight.dtype), kept.to(weight.device)
    return _solve([weight @ gram[:, kept]], gram[kept][:, kept], weight[:, kept], ridge)[0]


def _equations(weight: torch.Tensor, moments: Moments, kept: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The targets E[y x_S'] of the own function and of the two of `Evidence`, and H_SS, in the dtype of `weight`."""
    gram, cross, kept = moments.gram.to(weight), moments.cross.to(weight), kept.to(weight.device)
    return [weight @ gram, *cross.split(weight.shape[0])], gram[kept]


def _solve(targets: list[torch.Tensor], system: torch.Tensor, original: torch.Tensor, ridge: float) -> list[torch.Tensor]:
    """(T + mu W_S)(H_SS + mu I)^-1 for each target T = E[y x_S'], with mu = ridge * mean diag(H_SS)."""
    import torch

    mu = ridge * system.diagonal().mean()
    if not 0 < mu < math.inf:  # the kept inputs were all zero (or overflowed): nothing to solve for
        return [original.clone() for _ in targets]
    system = system.clone()
    system.diagonal().add_(mu)
    right = torch.cat([target + mu * original for target in targets])
    factor, failed = torch.linalg.cholesky_ex(system)
    # Of a Gram matrix with mu on its diagonal no pivot is below mu, and no eigenvalue: where one is by far, rounding outweighs
    # the ridge, and the nearest such system is solved. Not lstsq: on CPUs the order of its pivots is whatever the memory
    # holds, so that it answers otherwise every time.
    if failed.item() or factor.diagonal().min().square() < mu / 2:
        values, vectors = torch.linalg.eigh(system)
        solved = (right @ vectors / values.clamp_min(mu)) @ vectors.T
    else:
        solved = torch.cholesky_solve(right.T, factor).T
    return list(solved.split(original.shape[0]))


def output_error(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, solved: torch.Tensor) -> float:
    """Mean squared output error E|W x - V x_S|^2 of `solved` on inputs with the given Gram matrix."""
    difference = float64(weight).clone()
    difference[:, kept.to(difference.device)] -= float64(solved)
    return ((difference @ float64(gram)) * difference).sum().item()


@dataclass(frozen=True)
class Repair:
    """A repair; whether it adds an output bias, and whether it solves for weights.

    One that solves is given second moments and targets, and also refits sublayers that keep everything; else the evidence
    has means and mean squares only.
    """

    heal: Callable[[Evidence], Healed]
    adds_bias: bool = False
    solves: bool = False


# None leaves the sliced weights as they are.
REPAIRS: dict[str, Repair | None] = {
    "least_squares": Repair(least_squares, solves=True),
    "bias": Repair(bias, adds_bias=True),
    "none": None,
}
