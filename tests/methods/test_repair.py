"""Least squares: the closed form, exact where it can be, and never worse than no repair on its own inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from LLMPruner.methods import repair as module
from LLMPruner.methods.moments import Moments
from LLMPruner.methods.repair import Evidence, bias, least_squares, output_error, solve_own


def draw(seed: int, *, rank: int, columns: int = 9, hidden: int = 5, kept: int = 4):
    """A weight, the Gram matrix of 40 inputs of the given rank and very unequal scales, and the kept columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    inputs *= torch.logspace(-2, 2, columns)[torch.randperm(columns, generator=generator)]
    weight = torch.randn(hidden, columns, generator=generator)
    return weight, inputs, torch.randperm(columns, generator=generator)[:kept].sort().values


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    moments = Moments()
    moments.add(inputs)
    return moments.gram


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1e-8, 1e-3, 0.01, 1.0, 100.0]))
def test_it_never_raises_the_output_error_on_its_calibration_inputs(seed, rank, kept, ridge):
    weight, inputs, kept = draw(seed, rank=rank, kept=kept)
    gram = gram_of(inputs.double()).double()
    before = output_error(weight, gram, kept, weight[:, kept])
    after = output_error(weight, gram, kept, solve_own(weight, gram, kept, ridge=ridge))
    # the solution is rounded to float32
    assert after <= before * (1 + 1e-5) + 1e-9 * gram.diagonal().sum() * weight.square().sum()


@given(st.integers(0, 10**6))
def test_it_is_the_minimum_of_its_own_objective(seed):
    weight, inputs, kept = draw(seed, rank=9)
    weight, gram = weight.double(), inputs.double().T @ inputs.double() / len(inputs)
    pull = 0.1 * gram[kept][:, kept].diagonal().mean()

    def objective(solved: torch.Tensor) -> float:
        return output_error(weight, gram, kept, solved) + (pull * (solved - weight[:, kept]).square().sum()).item()

    solved = solve_own(weight, gram, kept, ridge=0.1)
    for _ in range(5):
        assert objective(solved) <= objective(solved + 1e-3 * torch.randn(solved.shape, dtype=torch.float64)) * (1 + 1e-12)


def test_it_equals_the_closed_form_worked_by_hand():
    """One kept input a, one removed b, E[aa]=2, E[ab]=1: V = (2 w_a + w_b + mu w_a) / (2 + mu), mu = 0.5 * 2."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    weight = torch.tensor([[3.0, 6.0], [0.0, -3.0]])
    solved = solve_own(weight, gram, torch.tensor([0]), ridge=0.5)
    torch.testing.assert_close(solved.float(), torch.tensor([[(6 + 6 + 3) / 3], [-1.0]]))


def test_removed_inputs_that_are_combinations_of_kept_ones_are_recovered_exactly():
    generator = torch.Generator().manual_seed(0)
    kept_inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    inputs = torch.cat([kept_inputs, kept_inputs @ torch.randn(4, 3, generator=generator, dtype=torch.float64)], dim=1)
    weight, kept = torch.randn(5, 7, generator=generator, dtype=torch.float64), torch.arange(4)
    gram = inputs.T @ inputs / len(inputs)
    solved = solve_own(weight, gram, kept, ridge=1e-12)
    torch.testing.assert_close(kept_inputs @ solved.T, inputs @ weight.T)
    assert output_error(weight, gram, kept, weight[:, kept]) > 1


def test_keeping_everything_changes_nothing():
    weight, inputs, _ = draw(0, rank=9)
    torch.testing.assert_close(solve_own(weight, gram_of(inputs), torch.arange(9)).float(), weight, rtol=1e-4, atol=1e-5)


def test_a_strong_ridge_pulls_back_to_the_sliced_weights():
    weight, inputs, kept = draw(0, rank=9)
    solved = solve_own(weight, gram_of(inputs), kept, ridge=1e9)
    torch.testing.assert_close(solved.float(), weight[:, kept], rtol=1e-4, atol=1e-4)


def test_kept_inputs_that_are_always_zero_leave_the_sliced_weights():
    weight = torch.randn(3, 4)
    for gram in (torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0]))):
        assert torch.equal(solve_own(weight, gram, torch.tensor([1, 3])), weight[:, [1, 3]].double())


def test_one_dead_input_among_live_ones_keeps_its_weights():
    weight, inputs, kept = draw(0, rank=9)
    inputs[:, kept[1]] = 0
    solved = solve_own(weight, gram_of(inputs), kept)
    assert solved.isfinite().all()
    torch.testing.assert_close(solved[:, 1].float(), weight[:, kept[1]], rtol=1e-4, atol=1e-5)


def rounded_gram(rounding: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, kept columns and a Gram matrix of low rank with rounding errors, relative to the scales of its columns."""
    weight, inputs, kept = draw(0, rank=2)
    gram = gram_of(inputs).double()
    scale = gram.diagonal().sqrt()
    noise = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return weight.double(), gram + rounding * (noise + noise.T) * scale * scale.unsqueeze(1), kept


def test_a_gram_matrix_that_rounding_made_indefinite_is_solved_as_the_nearest_one():
    weight, gram, kept = rounded_gram(0.05)
    system = gram[kept][:, kept]
    mu = 1e-6 * system.diagonal().mean()
    values, vectors = torch.linalg.eigh(system)
    assert values.min() < -mu, "or this test proves nothing"
    nearest = (vectors * values.clamp_min(0)) @ vectors.T + mu * torch.eye(len(kept))
    solved = solve_own(weight, gram, kept, ridge=1e-6)
    torch.testing.assert_close(solved @ nearest, weight @ gram[:, kept] + mu * weight[:, kept])


def test_an_indefinite_gram_matrix_is_solved_alike_whatever_the_memory_held():
    weight, gram, kept = rounded_gram(0.05)
    first = solve_own(weight, gram, kept, ridge=1e-6)
    for _ in range(20):
        for size in (3, 4, 5):
            torch.randint(-5, 5, (size,), dtype=torch.int32)  # freed at once: what a pivot order may be read from
        assert torch.equal(solve_own(weight, gram, kept, ridge=1e-6), first)


@pytest.mark.parametrize("off", [0.0099, 0.0099999, 0.0100001, 0.02])
def test_a_correlation_above_one_is_solved_as_one_on_either_side_of_singular(off):
    """With an eigenvalue just above -mu Cholesky succeeds, and its answer would be thousands of times the weights."""
    weight, kept = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0, 1])
    gram = torch.tensor([[1, 1 + off, 0.5], [1 + off, 1, 0.5], [0.5, 0.5, 1]])
    assert solve_own(weight, gram, kept).abs().max() < 50


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_overflown_inputs_leave_the_weights_as_they_are(broken):
    weight, kept = torch.randn(3, 4), torch.tensor([1, 3])
    gram = torch.eye(4)
    gram[1, 1] = broken
    assert torch.equal(solve_own(weight, gram, kept), weight[:, kept])


def evidence(seed: int, *, tokens: int = 400, drift: float = 0.0, dtype: torch.dtype = torch.float32) -> Evidence:
    """A sublayer of 9 columns, 6 of them kept, whose dense answers are its own function plus some drift to be undone."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, 9, generator=generator)
    weight = torch.randn(5, 9, generator=generator)
    wandering = torch.randn(9, 5, generator=generator)  # the drift is a function of the inputs, so it can be undone
    parts, kept = [], torch.tensor([0, 1, 3, 4, 6, 8])
    for _ in range(2):
        rows = torch.randn(tokens, 9, generator=generator) @ mixing
        answer = rows @ weight.T
        moments = Moments(kept=kept)
        moments.add(rows, targets=torch.cat([answer, answer + drift * (rows @ wandering)], 1))
        parts.append(moments)
    return Evidence(weight.to(dtype), kept, *parts)


def distance(found: Evidence, weight: torch.Tensor) -> float:
    """Squared distance to the dense residual stream on the held-out inputs, up to a constant."""
    gram, cross = found.held_out.gram[found.kept], found.held_out.cross[5:]
    return ((weight @ gram - 2 * cross) * weight).sum().item()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.0, 0.3, 3.0]))
def test_the_choice_on_held_out_windows_is_never_worse_there_than_no_repair(seed, tokens, drift):
    """With one setting for all windows: the solution on fit and held-out ones together is at least as good on the latter."""
    found = evidence(seed, tokens=tokens, drift=drift)
    sliced, healed = found.weight[:, found.kept], least_squares(found).weight
    spread = found.held_out.gram[found.kept].diagonal().sum().item()
    scale = abs(distance(found, sliced)) + spread * found.weight.square().sum().item()
    assert distance(found, healed) <= distance(found, sliced) + 1e-4 * scale


def test_drift_is_undone_where_the_inputs_tell_of_it_and_left_alone_where_they_do_not():
    assert least_squares(evidence(0, drift=1.0)).choice.startswith("drift")
    drifting = evidence(0, drift=1.0)
    gram = torch.zeros(9, 9)
    gram[:, drifting.kept] = (drifting.fit + drifting.held_out).gram
    own = solve_own(drifting.weight, gram, drifting.kept).float()
    assert distance(drifting, least_squares(drifting).weight) < distance(drifting, own)


def wide(seed: int, held_out: int) -> Evidence:
    """64 columns, 24 of them kept, with inputs that drifted, 8 outputs and so many held-out tokens."""
    generator = torch.Generator().manual_seed(seed)
    mixing, weight, kept = (torch.randn(shape, generator=generator) for shape in ((64, 64), (8, 64), (64,)))
    kept, parts = kept.topk(24).indices.sort().values, []
    for tokens in (200, held_out):
        dense = torch.randn(tokens, 64, generator=generator) @ mixing
        drift = torch.randn(tokens, 64, generator=generator)
        moments, answer = Moments(kept=kept), dense @ weight.T
        moments.add(dense + drift, targets=torch.cat([answer, answer - drift @ weight.T + dense[:, :8]], 1))
        parts.append(moments)
    return Evidence(weight, kept, *parts)


def written_out(found: Evidence) -> tuple[str, torch.Tensor]:
    """The definition in float64: every candidate's weights, its distance, and the best one on all windows."""
    weight, kept, hidden = found.weight.double(), found.kept, len(found.weight)
    gram, drift = found.held_out.gram[kept].double(), found.held_out.cross[hidden:].double()

    def solved(moments: Moments, ridge: float) -> list[torch.Tensor]:
        system = moments.gram[kept].double()
        mu = ridge * system.diagonal().mean()
        targets = [weight @ moments.gram.double(), *moments.cross.double().split(hidden)]
        return [(target + mu * weight[:, kept]) @ torch.linalg.inv(system + mu * torch.eye(len(kept))) for target in targets]

    best = (math.inf,)
    for ridge in module.RIDGES:
        own, *others = solved(found.fit, ridge)
        for place, name in enumerate(("dense", "drift")):
            step = others[place] - own
            share = (-((own @ gram - drift) * step).sum() / ((step @ gram) * step).sum()).clamp(0, 1).item()
            healed = own + share * step
            distance = ((healed @ gram - 2 * drift) * healed).sum().item()
            best = min(best, (distance, name if share else "own", share, ridge, place))
    _, name, share, ridge, place = best
    own, *others = solved(found.fit + found.held_out, ridge)
    return f"{name} {share:.2f} ridge {ridge:g}", own + share * (others[place] - own)


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("held_out", [5, 23, 24, 200])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_its_definition_says_whether_the_held_out_tokens_are_fewer_than_the_columns_or_not(
    monkeypatch, seed, held_out, block
):
    monkeypatch.setattr(module, "BLOCK", block)
    healed, (choice, weight) = least_squares(wide(seed, held_out)), written_out(wide(seed, held_out))
    assert healed.choice == choice
    torch.testing.assert_close(healed.weight, weight.float(), rtol=1e-4, atol=1e-5)


class Sizes(TorchDispatchMode):
    """How many bytes each tensor has that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        given |= {value.untyped_storage().data_ptr() for value in (kwargs or {}).values() if isinstance(value, torch.Tensor)}
        for made in result if isinstance(result, tuple) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.bytes.append(made.numel() * made.element_size())
        return result


@pytest.mark.parametrize("held_out", [23, 200])
def test_no_memory_is_larger_than_the_one_system_that_is_solved(monkeypatch, held_out):
    """The Gram matrices of all dense columns are neither copied, nor converted, nor summed as a whole."""
    monkeypatch.setattr(module, "BLOCK", 4)
    found = wide(0, held_out)
    with Sizes() as sizes:
        assert least_squares(found).choice != "none"
    system = 24 * 24 * 8  # bytes
    assert max(sizes.bytes) == system and sizes.bytes.count(system) == 1


def test_noise_from_too_few_tokens_is_not_fitted():
    """Three tokens say nothing that holds on others: what is chosen stays near the sliced weights or is them."""
    found = evidence(3, tokens=3)
    noise = Moments(kept=found.kept)
    generator = torch.Generator().manual_seed(9)
    noise.add(torch.randn(400, 9, generator=generator), targets=torch.zeros(400, 10))
    healed = least_squares(Evidence(found.weight, found.kept, found.fit, noise))
    assert healed.weight.norm() <= 1.5 * found.weight[:, found.kept].norm()


def test_bias_adds_what_the_removed_columns_gave_on_average():
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(50, 4, generator=generator) + 2, torch.randn(3, 4, generator=generator)
    fit, held_out = Moments(), Moments()
    fit.add(rows[:30])
    held_out.add(rows[30:])
    healed = bias(Evidence(weight, torch.tensor([0, 2]), fit, held_out))
    assert torch.equal(healed.weight, weight[:, [0, 2]])
    torch.testing.assert_close(rows[:, [0, 2]].mean(0) @ healed.weight.T + healed.bias, rows.mean(0) @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repair", [least_squares, bias])
def test_the_result_has_the_weights_dtype_and_the_evidence_stays_as_it_was(repair, dtype):
    found, same = evidence(0, dtype=dtype), evidence(0, dtype=dtype)
    healed = repair(found)
    assert healed.weight.dtype == dtype and (healed.bias is None or healed.bias.dtype == dtype)
    assert torch.equal(found.weight, same.weight)
    assert torch.equal(found.fit.gram, same.fit.gram) and torch.equal(found.held_out.cross, same.held_out.cross)


def test_output_error_is_the_mean_squared_difference_of_outputs():
    weight, inputs, kept = draw(0, rank=9)
    solved = torch.randn(5, len(kept))
    difference = inputs @ weight.T - inputs[:, kept] @ solved.T
    expected = difference.square().sum(1).mean().item()
    assert output_error(weight, gram_of(inputs), kept, solved) == pytest.approx(expected, rel=1e-4)
