"""Hidden states in batches: every window once, in order, and back where they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.model.hidden import batches, fetch, mapped

CPU = torch.device("cpu")


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 40))
def test_batches_cover_every_window_once_and_keep_to_the_size(count, seq_len, batch_tokens):
    slices = list(batches(count, seq_len, batch_tokens))
    assert [index for part in slices for index in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert all(0 < size <= max(1, batch_tokens // seq_len) for size in sizes), "a window longer than a batch goes alone"
    assert len(set(sizes[:-1])) <= 1, "only the last is smaller"


@pytest.mark.parametrize("batch_tokens", [1, 6, 100])
def test_a_step_of_each_batch_is_that_of_all(batch_tokens):
    hidden, seen = torch.randn(5, 3, 4), []

    def step(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return 2 * batch + 1

    before = hidden.clone()
    assert torch.equal(mapped(hidden, step, CPU, batch_tokens), 2 * hidden + 1)
    assert torch.equal(hidden, before) and sum(seen) == 5 and max(seen) == min(5, max(1, batch_tokens // 3))


def test_a_step_computes_on_the_device_that_is_named_and_its_results_lie_beside_the_hidden_states():
    """`meta` stands for a device other than the one where the hidden states are."""
    devices = []

    def step(batch: torch.Tensor) -> torch.Tensor:
        devices.append(batch.device.type)
        return torch.ones(batch.shape)

    hidden = torch.zeros(4, 3, 2)
    assert fetch(hidden, slice(1, 3), torch.device("meta")).shape == (2, 3, 2)
    output = mapped(hidden, step, torch.device("meta"), 3)
    assert devices == ["meta"] * 4 and output.device == hidden.device and output.eq(1).all()
