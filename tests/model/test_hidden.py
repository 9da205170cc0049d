"""Hidden states in batches: every window once, in order, and back where they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.errors import RunError
from LLMPruner.model.hidden import BATCH_TOKENS, Home, affordable, batches, fetch
from LLMPruner.plan import Geometry

CPU = torch.device("cpu")
GEOMETRY = Geometry(300, 64, 96, 4, 8, 2, 8)


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 40))
def test_batches_cover_every_window_once_and_keep_to_the_size(count, seq_len, batch_tokens):
    slices = list(batches(count, seq_len, batch_tokens))
    assert [index for part in slices for index in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert all(0 < size <= max(1, batch_tokens // seq_len) for size in sizes), "a window longer than a batch goes alone"
    assert len(set(sizes[:-1])) <= 1, "only the last is smaller"


def test_a_batch_is_fetched_to_the_device_that_computes():
    """`meta` stands for a device other than the one where the hidden states are."""
    part = fetch(torch.zeros(4, 3, 2), slice(1, 3), torch.device("meta"))
    assert part.shape == (2, 3, 2) and part.device.type == "meta"


def test_what_does_not_fit_the_limit_lies_in_files_and_is_as_good(tmp_path):
    home = Home(CPU, limit=4 * 3 * 2 * 4, folder=tmp_path)
    inside, outside = (home.empty((4, 3, 2), torch.float32) for _ in range(2))
    assert home.held == home.limit and not any(tmp_path.iterdir())
    outside[1:3] = 7
    assert home.empty_like(outside).shape == outside.shape and outside[1:3].eq(7).all()
    del inside
    assert home.held == 0


def test_the_limit_is_of_what_pinned_memory_takes(tmp_path):
    """A power of two: 2400 bytes take 4096."""
    home = Home(CPU, pinned=True, limit=3000, folder=tmp_path)
    assert home.empty((600,), torch.float32).shape == (600,) and home.held == 0


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match="no room for 1.0 GB of hidden states.*--hidden_gb"):
        Home(CPU, limit=0, folder=tmp_path).empty((1 << 18, 1000), torch.float32)
    assert not any(tmp_path.iterdir())


@given(st.integers(0, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_as_many_tokens_go_together_as_the_free_memory_takes(exponent, dtype):
    free = 1 << exponent
    tokens = affordable(GEOMETRY, dtype, free)
    assert 1 <= tokens <= BATCH_TOKENS and affordable(GEOMETRY, dtype, 2 * free) >= tokens
    assert affordable(GEOMETRY, dtype, 1 << 50) == BATCH_TOKENS and affordable(GEOMETRY, dtype, 0) == 1
