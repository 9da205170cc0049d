"""Closed-form repair: the output projection of what a sublayer keeps is solved again, so that the model answers as dense.

A repair is one function from a sublayer's `Evidence` to new output weights, and one entry in REPAIRS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from LLMPruner.model.device import float64

if TYPE_CHECKING:  # the command line reads REPAIRS and must not wait for torch
    import torch

    from LLMPruner.methods.moments import Moments

RIDGE = 0.01  # pull towards the original weights, relative to the mean diagonal of the kept Gram matrix
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)  # strengths that held-out windows choose from
BLOCK = 1024  # rows of a Gram matrix that are converted or summed at a time


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

    Sums over the tokens take the place of means throughout: no setting and no solution depends on the scale.
    """
    weight, kept = evidence.weight, evidence.kept.to(evidence.weight.device)
    unrepaired, held_out = Healed(weight[:, kept], choice="none"), _HeldOut(evidence.held_out, kept, weight.shape[0])
    unhealed = held_out.distance(unrepaired.weight.float())
    evidence.fit.multiply()  # each ridge reads its Gram matrix
    own = _times_gram(weight, (evidence.fit,), like=unrepaired.weight.float())
    candidates = [(unhealed, "none", 0.0, 0.0)]
    for ridge in RIDGES:
        candidates += _candidates(evidence, unrepaired.weight, own, held_out, ridge)
    del own  # what follows is in float64 and needs the memory
    _, name, share, ridge = min(candidates)
    if name == "none":
        return unrepaired
    healed = _solution(evidence, unrepaired.weight, name, share, ridge)
    # On few tokens the solution on all windows can be worse on the held-out ones; NaN is no better either.
    if held_out.distance(healed.float().to(weight.device)) <= unhealed:
        return Healed(healed.to(weight.dtype).to(weight.device), choice=f"{name} {share:.2f} ridge {ridge:g}")
    return unrepaired


def _candidates(
    evidence: Evidence, original: torch.Tensor, own: torch.Tensor, held_out: _HeldOut, ridge: float
) -> list[tuple[float, str, float, float]]:
    """Held-out distance, name, best share and ridge of the steps towards the two targets, from that of the own function `own`.

    All `(hidden, k)`; solved in float32, which is twice as fast as float64. Empty where there is nothing to solve for: the
    solutions would be the sliced weights `original`, a candidate already.
    """
    fit = evidence.fit
    mu, times_inverse = _inverse(lambda: _system((fit,), evidence.kept, like=own), ridge)
    if times_inverse is None:
        return []
    seen, found = held_out.seen_through(times_inverse), []
    base = seen(own.add(original, alpha=mu))
    gradient = held_out.weighed(base) - held_out.target
    unmoved = ((gradient - held_out.target) * base).sum().item()
    for name, other in zip(("dense", "drift"), fit.cross_sum(slice(None)).split(len(own)), strict=True):
        step = seen(other - own)  # solving is linear: the difference of the targets gives that of the solutions
        curvature, slope = (held_out.weighed(step) * step).sum().item(), (gradient * step).sum().item()
        share = min(max(-slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        found.append((unmoved + 2 * share * slope + share**2 * curvature, name if share else "own", share, ridge))
    return found


def _solution(evidence: Evidence, original: torch.Tensor, name: str, share: float, ridge: float) -> torch.Tensor:
    """The chosen setting on all windows, float64 `(hidden, k)`. The targets are mixed, not their solutions: it is linear."""
    weight, parts, hidden = evidence.weight, (evidence.fit, evidence.held_out), evidence.weight.shape[0]
    like = float64(original[:0])
    mu, times_inverse = _inverse(lambda: _system(parts, evidence.kept, like=like), ridge)
    if times_inverse is None:
        return float64(original)
    target = _times_gram(weight, parts, like=like)
    if share:
        target *= 1 - share
        for part in parts:
            other = part.cross_sum(slice(hidden, None) if name == "drift" else slice(hidden))
            target.add_(other.to(target.device), alpha=share)
    return times_inverse(target.add_(original.to(target.device), alpha=mu))


class _HeldOut:
    """The held-out windows as judge of output weights V `(hidden, k)`: their squared distance to the dense residual stream.

    Where the tokens are fewer than the columns, the windows see of V what it answers on them, V X' `(hidden, tokens)`; else V
    itself, weighed by their Gram matrix. In either case the distance is <weighed(seen) - 2 target, seen>, up to a constant.
    """

    def __init__(self, moments: Moments, kept: torch.Tensor, hidden: int) -> None:
        self._moments, self._kept, drifted = moments, kept, slice(hidden, None)
        tokens = moments.tokens(drifted)
        self._rows, self.target = (None, moments.cross_sum(drifted)) if tokens is None else (tokens[0], tokens[1].T)

    def distance(self, weight: torch.Tensor) -> float:
        """How far float32 weights are from the dense residual stream."""
        seen = weight if self._rows is None else weight @ self._rows.T
        return ((self.weighed(seen) - 2 * self.target) * seen).sum().item()

    def seen_through(self, times_inverse: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """From a right side R, which it may overwrite, to what the windows see of its solution R (H + mu I)^-1.

        Of R ((H + mu I)^-1 X') only what is in brackets needs solving, once for all right sides.
        """
        if self._rows is None:
            return times_inverse
        solved = times_inverse(self._rows.clone()).T
        return lambda right: right @ solved

    def weighed(self, seen: torch.Tensor) -> torch.Tensor:
        """Half the derivative of the squared answers by `seen`; it may be `seen`."""
        return seen if self._rows is not None else _times_gram(seen, (self._moments,), like=seen, rows=self._kept)


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
    kept = kept.to(weight.device)
    columns, original = gram[:, kept].to(weight.dtype), weight[:, kept]
    mu, times_inverse = _inverse(lambda: columns[kept], ridge)
    return original if times_inverse is None else times_inverse((weight @ columns).add_(original, alpha=mu))


def _gram_rows(parts: tuple[Moments, ...], which: slice | torch.Tensor) -> torch.Tensor:
    first, *others = (part.gram_sum(which) for part in parts)
    return sum(others, start=first)


def _times_gram(
    left: torch.Tensor, parts: tuple[Moments, ...], *, like: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """`left` `(n, columns)` times the Gram matrix of all `parts`, or those `rows` of it: `(n, k)`, typed as `like` `(.., k)`.

    Block by block: neither the sum of the parts nor a copy in another dtype is ever made of the whole matrix.
    """
    product = like.new_zeros(left.shape[0], like.shape[1])
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        gram = _gram_rows(parts, block if rows is None else rows[block])
        product.addmm_(left[:, block].to(like), gram.to(like))
    return product


def _system(parts: tuple[Moments, ...], kept: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """The kept rows H_SS of the Gram matrix of all `parts`, `(k, k)`, in the dtype of `like`; block by block as well."""
    system = like.new_empty(len(kept), len(kept))
    for rows, columns in zip(system.split(BLOCK), kept.split(BLOCK), strict=True):
        rows.copy_(_gram_rows(parts, columns))
    return system


def _inverse(system: Callable[[], torch.Tensor], ridge: float) -> tuple[float, Callable[[torch.Tensor], torch.Tensor] | None]:
    """mu = ridge * mean diag(H_SS), and the function R -> R (H_SS + mu I)^-1, which may overwrite R `(n, k)`.

    `system` makes H_SS `(k, k)`, which is overwritten. None where the kept inputs were all zero (or overflowed): there is
    nothing to solve for.
    """
    import torch

    matrix = system()
    mu = ridge * matrix.diagonal().mean().item()
    if not 0 < mu < math.inf:
        return mu, None
    matrix.diagonal().add_(mu)
    factor, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))  # of columns that lie side by side no copy is made
    # Of a Gram matrix with mu on its diagonal no pivot is below mu, and no eigenvalue: where one is by far, rounding outweighs
    # the ridge, and the nearest such system is solved. Not lstsq: on CPUs the order of its pivots is whatever the memory
    # holds, so that it answers otherwise every time.
    if failed.item() or factor.diagonal().min().square() < mu / 2:
        del matrix, factor
        matrix = system()
        matrix.diagonal().add_(mu)
        values, vectors = torch.linalg.eigh(matrix)
        return mu, lambda right: (right @ vectors / values.clamp_min(mu)) @ vectors.T
    return mu, partial(_times_cholesky_inverse, factor)


def _times_cholesky_inverse(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """R (L L')^-1 in the memory of R `(n, k)`, with L lower triangular."""
    import torch

    torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False, out=right)
    return torch.linalg.solve_triangular(factor, right, upper=False, left=False, out=right)


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
