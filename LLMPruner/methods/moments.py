"""What the criteria and the repairs know of a sublayer's inputs: their mean, mean square and Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the registries that use this and must not wait for torch
    import torch


class Moments:
    """First and second moments of inputs `x` `(columns,)`, gathered batch by batch in float32 whatever the model's dtype.

    With `gram` the whole second moment E[x x'] is gathered, else its diagonal alone; with `targets` y, E[y x'] as well. With
    `kept`, column indices S `(k,)`, both hold these columns only, E[x x_S'] and E[y x_S']: all that solving for them needs.
    Raises ValueError for `kept` without `gram`, and where moments of different columns are added.
    """

    def __init__(self, *, gram: bool = True, kept: torch.Tensor | None = None) -> None:
        if kept is not None and not gram:
            raise ValueError("kept columns are of the Gram matrix")
        self._full, self._kept = gram, kept
        self._first: torch.Tensor | None = None
        self._second: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self.count = 0

    def add(self, inputs: torch.Tensor, *, targets: torch.Tensor | None = None) -> None:
        """Add a batch: inputs `(tokens, columns)`, targets `(tokens, outputs)`."""
        rows = inputs.float()
        self._first = _plus(self._first, rows.sum(0))
        chosen = rows if self._kept is None else rows[:, self._kept]
        with _exact_products(inputs):
            self._second = _plus(self._second, rows.T @ chosen if self._full else rows.square().sum(0))
        if targets is not None:
            with _exact_products(inputs, targets):
                self._cross = _plus(self._cross, targets.float().T @ chosen)
        self.count += rows.shape[0]

    def __add__(self, other: Moments) -> Moments:
        """The moments of both inputs together."""
        if self._full != other._full or not _same(self._kept, other._kept):
            raise ValueError("the moments are of different columns")
        total = Moments(gram=self._full, kept=self._kept)
        total.count = self.count + other.count
        for name in ("_first", "_second", "_cross"):
            mine, its = getattr(self, name), getattr(other, name)
            setattr(total, name, its if mine is None else mine if its is None else mine + its)
        return total

    @property
    def mean(self) -> torch.Tensor:
        """E[x], float32 `(columns,)`."""
        return self._mean(self._first)

    @property
    def gram(self) -> torch.Tensor:
        """E[x x'], float32 `(columns, columns)`, or E[x x_S'] `(columns, k)`."""
        return self._mean(self._second)

    @property
    def cross(self) -> torch.Tensor:
        """E[y x'], float32 `(outputs, columns)`, or E[y x_S'] `(outputs, k)`. Raises ValueError when no targets were added."""
        return self._mean(self._cross)

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x^2], float32 `(columns,)`. Raises ValueError where only some columns were asked for."""
        if self._full and self._kept is not None:
            raise ValueError("mean squares of all columns were not gathered")
        return self._mean(self._second.diagonal() if self._full and self._second is not None else self._second)

    @property
    def variance(self) -> torch.Tensor:
        """E[x^2] - E[x]^2, float32 `(columns,)`."""
        return (self.mean_square - self.mean.square()).clamp_min(0)

    def _mean(self, total: torch.Tensor | None) -> torch.Tensor:
        if total is None:
            raise ValueError("no such input was added to the moments")
        return total / self.count


def token_scales(*streams: torch.Tensor) -> torch.Tensor:
    """By what each token's inputs and targets are divided, float32 `(n, seq_len, 1)`, so that it counts relative to its size.

    The next norm divides by the length of the residual stream, so an error matters relative to that length. A pruned model
    makes false massive activations: single tokens whose stream is 50 times as long as it should be. Unweighted, they would
    hold half of the squared error, and least squares would serve them alone. Hence the largest root mean square that the token
    has in any of `streams` `(n, seq_len, hidden)`, rounded to a power of two: bfloat16 values divided by it stay exact.
    """
    import torch

    squares = torch.stack([stream.float().square().mean(-1, keepdim=True) for stream in streams]).amax(0)
    return torch.exp2((squares.clamp_min(torch.finfo(torch.float32).tiny).log2() / 2).round())


def relative_to(scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` `(n, seq_len, width)` divided by the tokens' scales, in their own dtype."""
    return (values / scales).to(values.dtype)


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total.add_(term)


def _same(kept: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return kept is other or (kept is not None and other is not None and kept.equal(other))


@contextmanager
def _exact_products(*factors: torch.Tensor) -> Iterator[None]:
    """Where all `factors` were bfloat16, float32 products by the processor's units for short formats (bfloat16, TF32).

    Nothing is lost, for the factors fit them and the sums stay float32, and it takes less than half of the time.
    """
    import torch

    if any(factor.dtype != torch.bfloat16 for factor in factors):
        yield
        return
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = "bf16", "tf32"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
