"""Moments: means over tokens, whatever the batches, in float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from LLMPruner.methods.moments import Moments, relative_to, token_scales

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(40, 9, generator=GENERATOR) + 1
TARGETS = torch.randn(40, 5, generator=GENERATOR)


def gathered(step: int = 40, **options) -> Moments:
    moments = Moments(**options)
    for rows, targets in zip(ROWS.split(step), TARGETS.split(step), strict=True):
        moments.add(rows, targets=targets)
    return moments


@pytest.mark.parametrize("step", [40, 7, 1])
def test_they_are_means_over_all_tokens_whatever_the_batches(step):
    moments = gathered(step)
    assert moments.count == 40
    torch.testing.assert_close(moments.mean, ROWS.mean(0))
    torch.testing.assert_close(moments.gram, ROWS.T @ ROWS / 40)
    torch.testing.assert_close(moments.mean_square, ROWS.square().mean(0))
    torch.testing.assert_close(moments.variance, ROWS.var(0, correction=0))
    torch.testing.assert_close(moments.cross, TARGETS.T @ ROWS / 40)


def test_without_a_gram_matrix_the_rest_is_the_same():
    small, whole = gathered(gram=False), gathered()
    torch.testing.assert_close(small.mean_square, whole.mean_square)
    torch.testing.assert_close(small.variance, whole.variance)


def test_kept_columns_are_those_of_the_whole():
    kept = torch.tensor([0, 3, 8])
    part, whole = gathered(7, kept=kept) + gathered(40, kept=kept), gathered()
    torch.testing.assert_close(part.gram, whole.gram[:, kept])
    torch.testing.assert_close(part.cross, whole.cross[:, kept])
    torch.testing.assert_close(part.mean, whole.mean)
    with pytest.raises(ValueError, match="not gathered"):
        _ = part.mean_square


def test_the_sum_of_two_is_what_both_inputs_together_give_and_leaves_them_as_they_were():
    first, second = Moments(), Moments()
    first.add(ROWS[:10], targets=TARGETS[:10])
    second.add(ROWS[10:], targets=TARGETS[10:])
    total, before = first + second, first.gram.clone()
    torch.testing.assert_close(total.gram, gathered().gram)
    torch.testing.assert_close(total.cross, gathered().cross)
    assert torch.equal(first.gram, before) and first.count == 10


@pytest.mark.parametrize("kept", [None, torch.tensor([0, 3, 4, 6, 8])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_stay_as_they_are_while_they_are_fewer_than_the_columns_and_give_the_same_sums(kept, dtype):
    width, which = 9 if kept is None else len(kept), torch.tensor([1, 4])
    moments, rows = Moments(kept=kept), ROWS.to(dtype)
    for place in range(width - 1):
        moments.add(rows[place : place + 1], targets=TARGETS[place : place + 1])
    inputs, targets = moments.tokens(slice(3, None))
    chosen = rows[: width - 1].float() if kept is None else rows[: width - 1, kept].float()
    assert torch.equal(inputs, chosen) and torch.equal(targets, TARGETS[: width - 1, 3:])
    early = [read(part) for read in (moments.gram_sum, moments.cross_sum) for part in (which, slice(2, 5))]
    assert moments.tokens(slice(None)) is not None, "reading sums multiplies nothing for good"
    torch.testing.assert_close(early[0], rows[: width - 1].float().T[which] @ chosen)
    torch.testing.assert_close(early[3], TARGETS[: width - 1].T[2:5] @ chosen)
    moments.multiply()
    late = [read(part) for read in (moments.gram_sum, moments.cross_sum) for part in (which, slice(2, 5))]
    torch.testing.assert_close(early, late)
    moments.add(rows[width - 1 :], targets=TARGETS[width - 1 :])
    assert moments.tokens(slice(None)) is None
    torch.testing.assert_close(
        moments.gram, gathered(kept=kept).gram, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2
    )


class Fresh(TorchDispatchMode):
    """How many elements each tensor has whose memory is new."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.sizes.append(result.numel())
        return result


def test_a_batch_is_added_where_the_sums_are_without_a_second_matrix_of_their_size():
    moments = gathered(40)
    with Fresh() as fresh:
        moments.add(ROWS[:5], targets=TARGETS[:5])
    assert fresh.sizes and max(fresh.sizes) < 5 * 9 < moments.gram.numel()


def test_statistics_are_float32_whatever_the_inputs():
    moments = Moments()
    moments.add(ROWS.bfloat16())
    assert moments.gram.dtype == moments.mean.dtype == torch.float32


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no such input"):
        _ = Moments().gram
    moments = Moments()
    moments.add(ROWS)
    with pytest.raises(ValueError, match="no such input"):
        _ = moments.cross


def test_moments_of_different_columns_are_not_added_and_kept_ones_are_of_the_gram_matrix():
    first, second = torch.tensor([0, 2]), torch.tensor([1, 2])
    for other in (Moments(kept=second), Moments(), Moments(gram=False)):
        with pytest.raises(ValueError, match="different columns"):
            _ = Moments(kept=first) + other
    _ = Moments(kept=first) + Moments(kept=first.clone())
    with pytest.raises(ValueError, match="Gram matrix"):
        Moments(gram=False, kept=first)


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends)]


@pytest.mark.parametrize("whole", [None, "tf32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32])
def test_short_formats_lose_nothing_and_the_settings_of_the_process_stay(monkeypatch, dtype, target_dtype, whole):
    """Sums of many products, so that rounding any factor or sum to bfloat16 would show."""
    if whole is not None:  # as the Trainer sets it
        monkeypatch.setattr(torch.backends, "fp32_precision", whole)
    generator, before = torch.Generator().manual_seed(1), precisions()
    rows = (torch.randn(512, 64, generator=generator) + 3).to(dtype)
    targets = (torch.randn(512, 32, generator=generator) - 2).to(target_dtype)
    moments = Moments()
    moments.add(rows, targets=targets)
    torch.testing.assert_close(moments.gram.double(), rows.double().T @ rows.double() / 512, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.cross.double(), targets.double().T @ rows.double() / 512, rtol=1e-5, atol=0)
    assert precisions() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_scale_is_a_power_of_two_near_its_largest_size_and_dividing_by_it_is_exact(dtype):
    generator = torch.Generator().manual_seed(2)
    small, large = (torch.randn(2, 5, 64, generator=generator).mul(factor).to(dtype) for factor in (0.01, 30.0))
    mixed = small.clone()
    mixed[0, 3] = large[0, 3]  # a massive activation in one of the streams
    scales = token_scales(small, mixed)
    sizes = torch.stack([stream.float().square().mean(-1, keepdim=True).sqrt() for stream in (small, mixed)]).amax(0)
    assert scales.shape == (2, 5, 1) and scales.dtype == torch.float32
    assert torch.equal(scales.log2(), scales.log2().round()) and ((scales / sizes).log2().abs() <= 0.5).all()
    assert scales[0, 3] > 100 * scales[0, 2] and torch.equal(token_scales(mixed, small), scales)
    relative = relative_to(scales, mixed)
    assert relative.dtype == dtype and torch.equal(relative.float() * scales, mixed.float())
    assert relative.float().square().mean(-1).sqrt().clamp(0.5, 2).equal(relative.float().square().mean(-1).sqrt())


def test_a_token_that_is_zero_everywhere_has_a_finite_scale():
    zero = torch.zeros(1, 2, 8)
    scales = token_scales(zero, zero)
    assert scales.isfinite().all() and (scales > 0).all() and not relative_to(scales, zero).any()
