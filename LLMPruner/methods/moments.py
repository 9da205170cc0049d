"""What the criteria and the repairs know of a sublayer's inputs: their mean, mean square and Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from LLMPruner import parallel

if TYPE_CHECKING:  # the command line reads the registries that use this and must not wait for torch
    import torch


class Moments:
    """First and second moments of inputs `x` `(columns,)`, gathered batch by batch in float32 whatever the model's dtype.

    With `gram` the whole second moment E[x x'] is gathered, else its diagonal alone; with `targets` y, E[y x'] as well. With
    `kept`, column indices S `(k,)`, both hold these columns only, E[x x_S'] and E[y x_S']: all that solving for them needs.
    Inputs with targets stay as they are, unmultiplied, while the tokens are fewer than the Gram matrix has columns: they are
    smaller than it, and so is the work with them. They are not copied, so the caller must leave them as they are. Raises
    ValueError for `kept` without `gram`, and where moments of different columns are added.
    """

    def __init__(self, *, gram: bool = True, kept: torch.Tensor | None = None) -> None:
        if kept is not None and not gram:
            raise ValueError("kept columns are of the Gram matrix")
        self._full, self._kept = gram, kept
        self._first: torch.Tensor | None = None
        self._second: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self._tokens: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # batches that are in no product yet
        self.count = 0

    def add(self, inputs: torch.Tensor, *, targets: torch.Tensor | None = None) -> None:
        """Add a batch: inputs `(tokens, columns)`, targets `(tokens, outputs)`."""
        import torch

        self._first = _plus(self._first, inputs.sum(0, dtype=torch.float32))
        self._tokens.append((inputs, targets))
        self.count += inputs.shape[0]
        if not self._full or targets is None or self._second is not None or not self._are_few(inputs):
            self.multiply()

    def multiply(self) -> None:
        """Replace the tokens that stayed as they are, if any, by their products."""
        while self._tokens:
            inputs, targets = self._tokens.pop(0)
            rows, chosen = inputs.float(), self._chosen(inputs)
            with _exact_products(inputs):
                self._second = (
                    _plus_product(self._second, rows, chosen) if self._full else _plus(self._second, rows.square().sum(0))
                )
            if targets is not None:
                with _exact_products(inputs, targets):
                    self._cross = _plus_product(self._cross, targets.float(), chosen)

    def pool(self) -> Moments:
        """Make these, which are returned, the moments of all processes' inputs: each has added its own, if only none, and calls
        this."""
        import torch

        if parallel.count() == 1:
            return self
        self._first = parallel.summed(self._first)
        self.count = int(parallel.summed(torch.tensor(self.count)))
        if self._tokens and self._are_few(self._tokens[0][0]):  # in all processes: none has more than all together
            self._tokens = [tuple(parallel.gathered(torch.cat(part)) for part in zip(*self._tokens, strict=True))]
            return self
        self.multiply()
        self._second = parallel.summed(self._second)
        if self._cross is not None:
            self._cross = parallel.summed(self._cross)
        return self

    def tokens(self, outputs: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """x_S `(count, k)` and those `outputs` of y `(count, n)` in float32, where the tokens stayed as they are; else None."""
        import torch

        if not self._tokens:
            return None
        inputs, targets = zip(*self._tokens, strict=True)
        return torch.cat([self._chosen(batch) for batch in inputs]), torch.cat([batch[:, outputs].float() for batch in targets])

    def gram_sum(self, which: slice | torch.Tensor) -> torch.Tensor:
        """The rows `which` of the sum of x x', or x x_S', over the tokens, float32 `(rows, k)`; of a slice maybe a view."""
        return self._sum(self._second, which, of_targets=False)

    def cross_sum(self, which: slice | torch.Tensor) -> torch.Tensor:
        """The rows `which` of the sum of y x', or y x_S', over the tokens, float32 `(rows, k)`; of a slice maybe a view."""
        return self._sum(self._cross, which, of_targets=True)

    def _sum(self, total: torch.Tensor | None, which: slice | torch.Tensor, *, of_targets: bool) -> torch.Tensor:
        if not self._tokens:
            return _present(total)[which]
        for batch in self._tokens:  # there is no total yet
            factor = batch[of_targets]
            with _exact_products(batch[0], factor):
                total = _plus_product(total, factor[:, which].float(), self._chosen(batch[0]))
        return total

    def _are_few(self, inputs: torch.Tensor) -> bool:
        """Whether the tokens are fewer than the Gram matrix has columns."""
        return self.count < (inputs.shape[1] if self._kept is None else len(self._kept))

    def _chosen(self, inputs: torch.Tensor) -> torch.Tensor:
        """The columns S of a batch, float32 `(tokens, k)`."""
        return (inputs if self._kept is None else inputs[:, self._kept]).float()

    def __add__(self, other: Moments) -> Moments:
        """The moments of both inputs together."""
        if self._full != other._full or not _same(self._kept, other._kept):
            raise ValueError("the moments are of different columns")
        total = Moments(gram=self._full, kept=self._kept)
        total.count = self.count + other.count
        self.multiply()
        other.multiply()
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
        self.multiply()
        return self._mean(self._second)

    @property
    def cross(self) -> torch.Tensor:
        """E[y x'], float32 `(outputs, columns)`, or E[y x_S'] `(outputs, k)`. Raises ValueError when no targets were added."""
        self.multiply()
        return self._mean(self._cross)

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x^2], float32 `(columns,)`. Raises ValueError where only some columns were asked for."""
        if self._full and self._kept is not None:
            raise ValueError("mean squares of all columns were not gathered")
        self.multiply()
        return self._mean(self._second.diagonal() if self._full and self._second is not None else self._second)

    @property
    def variance(self) -> torch.Tensor:
        """E[x^2] - E[x]^2, float32 `(columns,)`."""
        return (self.mean_square - self.mean.square()).clamp_min(0)

    def _mean(self, total: torch.Tensor | None) -> torch.Tensor:
        return _present(total) / self.count


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


def _plus_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total` + left' right, where `total` is: a term beside it would be a second Gram matrix, gigabytes for large models."""
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _present(total: torch.Tensor | None) -> torch.Tensor:
    if total is None:
        raise ValueError("no such input was added to the moments")
    return total


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
