"""Device and precision: what this machine has, and 16 bits where its hardware computes in them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from LLMPruner.errors import UsageError
from LLMPruner.model.device import DTYPES, deterministic, dtype_name, float64, resolve_device, resolve_dtype


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UsageError, match=f"--device {name} is not available"):
        resolve_device(name)


@pytest.mark.parametrize(("has_gpu", "kind"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device_is_the_gpu_where_there_is_one(monkeypatch, has_gpu, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolve_device("auto").type == kind
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_the_default_precision_is_16_bit_where_the_gpu_computes_in_it(monkeypatch, fast):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast and not including_emulation)
    device = torch.device("cuda:1")
    assert resolve_dtype("auto", device) == (torch.bfloat16 if fast else torch.float32) and asked == [device]


@pytest.mark.parametrize(("bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_the_default_precision_on_a_cpu_follows_its_matrix_units(monkeypatch, bf16, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if amx else torch.float32)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "auto"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_given_precision_is_taken_on_any_device(name, device):
    dtype = resolve_dtype(name, torch.device(device))
    assert dtype == getattr(torch, name) and dtype_name(dtype) == name


def test_float64_is_exact_and_on_the_cpu_where_the_device_has_none():
    values = torch.randn(5).bfloat16()
    assert float64(values).dtype == torch.float64 and torch.equal(float64(values).bfloat16(), values)
    apple = SimpleNamespace(device=torch.device("mps"), cpu=lambda: values)  # no double() of its own
    assert torch.equal(float64(apple), values.double())


@pytest.mark.parametrize(("before", "warn_only"), [(False, False), (True, False), (True, True)])
def test_the_settings_of_the_process_are_what_they_were_after_deterministic_sums_also_after_a_failure(before, warn_only):
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
