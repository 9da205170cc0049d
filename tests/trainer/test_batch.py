"""As many windows at once as memory allows, activations recomputed only where one does not fit, and the choice kept."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, tiny_model

from LLMPruner.trainer import batch
from LLMPruner.trainer.batch import Batch, choose_batch
from LLMPruner.trainer.loss import Student
from LLMPruner.training_config import DistillConfig, FinetuneConfig

CONFIG = FinetuneConfig(batch_size=3, grad_accum=4, seq_len=16)
WINDOW, LAYERS = 1000, 10


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (12 * WINDOW, Batch(12, recompute=False)),
        (12 * WINDOW - 1, Batch(6, recompute=False)),
        (5 * WINDOW, Batch(4, recompute=False)),  # what divides a step's twelve
        (WINDOW, Batch(1, recompute=False)),
        (WINDOW - 1, Batch(3, recompute=True)),  # three tenths of a window each
        (10, Batch(1, recompute=True)),  # and if it does not fit, that is seen
    ],
)
def test_the_most_windows_that_divide_a_step_and_fit(room, expected):
    assert batch._fitting(CONFIG, WINDOW, LAYERS, room, 12) == expected


@pytest.mark.parametrize(("most", "windows"), [(1, 1), (5, 4), (11, 6), (100, 12)])
def test_no_more_windows_at_once_than_keep_the_cores_busy(most, windows):
    assert batch._fitting(CONFIG, WINDOW, LAYERS, 100 * WINDOW, most) == Batch(windows, recompute=False)


def test_on_a_cpu_long_windows_are_computed_one_by_one(tmp_path):
    student = Student(tiny_model(), DistillConfig())
    for seq_len, windows in ((128, 4), (512, 1)):
        assert choose_batch(student, CONFIG, random_windows(2, seq_len), tmp_path / str(seq_len)).windows == windows


def test_what_is_asked_for_is_taken_and_recomputed_where_it_does_not_fit():
    asked = FinetuneConfig(batch_size=3, grad_accum=4, seq_len=16, micro_batch=6)
    assert batch._fitting(asked, WINDOW, LAYERS, 6 * WINDOW, 12) == Batch(6, recompute=False)
    assert batch._fitting(asked, WINDOW, LAYERS, 6 * WINDOW - 1, 12) == Batch(6, recompute=True)


def test_the_memory_of_a_window_is_what_its_way_forward_keeps():
    model = tiny_model()
    student = Student(model, DistillConfig())
    one, three = (batch._kept_bytes(student, random_windows(count, 16)) for count in (1, 3))
    assert one > 16 * 4 * model.config.hidden_size * model.config.num_hidden_layers  # at least the stream before every layer
    assert one < 0.5 * three and three < 3 * one, "the rotary table is there once"
    for parameter in model.parameters():
        parameter.data = torch.cat([parameter.data] * 2)[: len(parameter)]  # storages twice as large
    assert batch._kept_bytes(student, random_windows(1, 16)) == one, "weights do not count"


def test_measuring_changes_no_random_number(tmp_path):
    student = Student(tiny_model(), DistillConfig())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose_batch(student, CONFIG, random_windows(4, 16), tmp_path)
    assert torch.rand(3).equal(expected)


def test_a_run_that_is_continued_keeps_its_batch(tmp_path, monkeypatch):
    student = Student(tiny_model(), DistillConfig())
    monkeypatch.setattr(batch, "available_memory", lambda _: 10**9)
    assert choose_batch(student, CONFIG, random_windows(4, 16), tmp_path) == Batch(12, recompute=False)
    monkeypatch.setattr(batch, "available_memory", lambda _: 0)
    assert choose_batch(student, CONFIG, random_windows(4, 16), tmp_path) == Batch(12, recompute=False)
    assert choose_batch(student, CONFIG, random_windows(4, 16), tmp_path / "new") == Batch(1, recompute=True)


def test_a_window_that_does_not_fit_the_memory_is_recomputed(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(batch, "_forward", full)
    student = Student(tiny_model(), DistillConfig())
    assert choose_batch(student, CONFIG, random_windows(4, 16), tmp_path) == Batch(1, recompute=True)
