"""Least squares: the closed form, exact where it can be, and never worse than no repair on its own inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from LLMPruner.methods.repair import Gram, least_squares, output_error


def draw(seed: int, *, rank: int, columns: int = 9, hidden: int = 5, kept: int = 4):
    """A weight, the Gram matrix of 40 inputs of the given rank and very unequal scales, and the kept columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    inputs *= torch.logspace(-2, 2, columns)[torch.randperm(columns, generator=generator)]
    weight = torch.randn(hidden, columns, generator=generator)
    return weight, inputs, torch.randperm(columns, generator=generator)[:kept].sort().values


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    gram = Gram()
    gram.add(inputs)
    return gram.matrix


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-8, 1e-3, 0.01, 1.0, 100.0]))
def test_it_never_raises_the_output_error_on_its_calibration_inputs(seed, rank, kept, ridge):
    weight, inputs, kept = draw(seed, rank=rank, kept=kept)
    gram = gram_of(inputs.double()).double()
    before = output_error(weight, gram, kept, weight[:, kept])
    after = output_error(weight, gram, kept, least_squares(weight, gram, kept, ridge=ridge))
    # the solution is rounded to float32
    assert after <= before * (1 + 1e-5) + 1e-9 * gram.diagonal().sum() * weight.square().sum()


@given(st.integers(0, 10**6))
def test_it_is_the_minimum_of_its_own_objective(seed):
    weight, inputs, kept = draw(seed, rank=9)
    weight, gram = weight.double(), inputs.double().T @ inputs.double() / len(inputs)
    pull = 0.1 * gram[kept][:, kept].diagonal().mean()

    def objective(solved: torch.Tensor) -> float:
        return output_error(weight, gram, kept, solved) + (pull * (solved - weight[:, kept]).square().sum()).item()

    solved = least_squares(weight, gram, kept, ridge=0.1)
    for _ in range(5):
        assert objective(solved) <= objective(solved + 1e-3 * torch.randn(solved.shape, dtype=torch.float64)) * (1 + 1e-12)


def test_it_equals_the_closed_form_worked_by_hand():
    """One kept input a, one removed b, E[aa]=2, E[ab]=1: V = (2 w_a + w_b + mu w_a) / (2 + mu), mu = 0.5 * 2."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    weight = torch.tensor([[3.0, 6.0], [0.0, -3.0]])
    solved = least_squares(weight, gram, torch.tensor([0]), ridge=0.5)
    torch.testing.assert_close(solved, torch.tensor([[(6 + 6 + 3) / 3], [-1.0]]))


def test_removed_inputs_that_are_combinations_of_kept_ones_are_recovered_exactly():
    generator = torch.Generator().manual_seed(0)
    kept_inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    inputs = torch.cat([kept_inputs, kept_inputs @ torch.randn(4, 3, generator=generator, dtype=torch.float64)], dim=1)
    weight, kept = torch.randn(5, 7, generator=generator, dtype=torch.float64), torch.arange(4)
    gram = inputs.T @ inputs / len(inputs)
    solved = least_squares(weight, gram, kept, ridge=1e-12)
    torch.testing.assert_close(kept_inputs @ solved.T, inputs @ weight.T)
    assert output_error(weight, gram, kept, weight[:, kept]) > 1


def test_keeping_everything_changes_nothing():
    weight, inputs, _ = draw(0, rank=9)
    torch.testing.assert_close(least_squares(weight, gram_of(inputs), torch.arange(9)), weight, rtol=1e-4, atol=1e-5)


def test_a_strong_ridge_pulls_back_to_the_sliced_weights():
    weight, inputs, kept = draw(0, rank=9)
    solved = least_squares(weight, gram_of(inputs), kept, ridge=1e9)
    torch.testing.assert_close(solved, weight[:, kept], rtol=1e-4, atol=1e-4)


def test_kept_inputs_that_are_always_zero_leave_the_sliced_weights():
    weight = torch.randn(3, 4)
    assert torch.equal(least_squares(weight, torch.zeros(4, 4), torch.tensor([1, 3])), weight[:, [1, 3]])
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(least_squares(weight, gram, torch.tensor([1, 3])), weight[:, [1, 3]])


def test_one_dead_input_among_live_ones_keeps_its_weights():
    weight, inputs, kept = draw(0, rank=9)
    inputs[:, kept[1]] = 0
    solved = least_squares(weight, gram_of(inputs), kept)
    assert solved.isfinite().all()
    torch.testing.assert_close(solved[:, 1], weight[:, kept[1]], rtol=1e-4, atol=1e-5)


def test_a_gram_matrix_that_rounding_made_indefinite_is_solved_all_the_same():
    weight, inputs, kept = draw(0, rank=2)
    gram = gram_of(inputs) - 0.05 * torch.eye(9) * gram_of(inputs).diagonal().mean()
    weight, gram = weight.double(), gram.double()
    system = gram[kept][:, kept]
    mu = 1e-6 * system.diagonal().mean()
    assert torch.linalg.eigvalsh(system).min() < -mu, "or this test proves nothing"
    solved = least_squares(weight, gram, kept, ridge=1e-6)
    torch.testing.assert_close(solved @ (system + mu * torch.eye(len(kept))), weight @ gram[:, kept] + mu * weight[:, kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_weights_dtype_and_the_inputs_stay_as_they_were(dtype):
    weight, inputs, kept = draw(0, rank=9)
    weight = weight.to(dtype)
    gram = gram_of(inputs).double()
    before = weight.clone(), gram.clone(), kept.clone()
    assert least_squares(weight, gram, kept).dtype == dtype
    assert all(torch.equal(old, new) for old, new in zip(before, (weight, gram, kept), strict=True))


def test_output_error_is_the_mean_squared_difference_of_outputs():
    weight, inputs, kept = draw(0, rank=9)
    solved = torch.randn(5, len(kept))
    difference = inputs @ weight.T - inputs[:, kept] @ solved.T
    expected = difference.square().sum(1).mean().item()
    assert output_error(weight, gram_of(inputs), kept, solved) == pytest.approx(expected, rel=1e-4)


def test_gram_is_the_mean_outer_product_whatever_the_batches():
    _, inputs, _ = draw(0, rank=9)
    gram = Gram()
    for batch in inputs.split(7):
        gram.add(batch)
    torch.testing.assert_close(gram.matrix, inputs.T @ inputs / len(inputs))
    assert gram.count == 40
    halves = Gram()
    halves.add(inputs.bfloat16())
    assert halves.matrix.dtype == torch.float32


def test_gram_without_inputs_is_refused():
    with pytest.raises(ValueError, match="no input"):
        _ = Gram().matrix
