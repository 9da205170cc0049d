"""OBS: the first cost is the exact rise of the refitted error, the order is better than chance, and ranks are nested."""

from __future__ import annotations

import pytest
import torch

from LLMPruner.methods.obs import removal_costs
from LLMPruner.methods.repair import output_error, solve_own


def problem(columns: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(6, columns, generator=generator), inputs.T @ inputs / 200


def refitted_error(weight: torch.Tensor, gram: torch.Tensor, kept: list[int]) -> float:
    kept = torch.tensor(kept)
    return output_error(weight, gram, kept, solve_own(weight, gram, kept, ridge=1e-9))


@pytest.mark.parametrize("width", [1, 3])
def test_the_lowest_cost_is_the_rise_of_the_error_when_that_unit_goes_and_the_rest_is_refitted(width, monkeypatch):
    monkeypatch.setattr("LLMPruner.methods.obs.DAMPING", 1e-9)
    weight, gram = problem()
    costs = removal_costs(weight, gram, width)
    errors = []
    for unit in range(12 // width):
        gone = range(unit * width, (unit + 1) * width)
        errors.append(refitted_error(weight, gram, [column for column in range(12) if column not in gone]))
    assert costs.argmin() == torch.tensor(errors).argmin()
    assert costs.min().item() == pytest.approx(min(errors), rel=1e-3)


def test_the_choice_is_better_than_random_choices():
    weight, gram = problem(columns=24, seed=1)
    order = removal_costs(weight, gram, 1).argsort().tolist()
    generator = torch.Generator().manual_seed(0)
    for keep in (6, 12, 18):
        chosen = refitted_error(weight, gram, sorted(order[24 - keep :]))
        others = [refitted_error(weight, gram, torch.randperm(24, generator=generator)[:keep].tolist()) for _ in range(100)]
        assert chosen < min(others)


def test_costs_are_distinct_so_that_the_order_is_certain_and_a_copy_goes_for_nothing():
    weight, gram = problem()
    inputs = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
    inputs[:, 7] = inputs[:, 2]
    costs = removal_costs(weight, inputs.T @ inputs / 300, 1)
    assert len(costs.unique()) == 12 and costs.argmin() in (2, 7)
    assert gram.shape == (12, 12)
