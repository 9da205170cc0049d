"""Sizes: parameters counted once, and bytes on disk that are never underestimated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import each_architecture, geometry_of, tiny_model

from LLMPruner.config import ExportConfig
from LLMPruner.errors import UsageError
from LLMPruner.model.load import LoadedModel, save_model
from LLMPruner.model.size import checkpoint_bytes, count_parameters, export_bytes, stored_dtype
from LLMPruner.model.source import find_model
from LLMPruner.plan import PruningPlan


@each_architecture
def test_shared_parameters_count_once(changes):
    model = tiny_model(**changes)
    storages = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert count_parameters(model) == sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_no_larger_than_its_estimate_and_no_more_than_the_headers_smaller(tmp_path, tokenizer, dtype):
    model = tiny_model().to(getattr(torch, dtype))
    save_model(tmp_path / "model.bin", LoadedModel(model, tokenizer, PruningPlan.dense(geometry_of(model)), {}))
    spare = checkpoint_bytes(count_parameters(model), dtype, "cpu") - (tmp_path / "model.bin").stat().st_size
    assert 0 < spare < 32 << 20


def test_the_estimate_follows_the_precision_and_a_missing_device_is_refused():
    wide, narrow = (checkpoint_bytes(10**9, dtype, "cpu") for dtype in ("float32", "float16"))
    assert wide - narrow == 2 * 10**9
    with pytest.raises(UsageError, match="--device cuda:99"):
        checkpoint_bytes(1, "float32", "cuda:99")


def test_exports_add_up_and_only_a_float32_gguf_is_wider_than_the_weights():
    one = checkpoint_bytes(10**6, "bfloat16", "cpu")
    assert export_bytes(10**6, ExportConfig(), "bfloat16", "cpu") == 0
    assert export_bytes(10**6, ExportConfig(("hf", "gguf", "padded")), "bfloat16", "cpu") == 3 * one
    wide = export_bytes(10**6, ExportConfig(("hf", "gguf"), gguf_type="f32"), "bfloat16", "cpu")
    assert wide == one + checkpoint_bytes(10**6, "float32", "cpu")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "float32"),
        ({"dtype": None}, "float32"),
        ({"torch_dtype": "auto"}, "float32"),
        ({}, "float32"),
    ],
)
def test_the_stored_precision_is_the_configs_where_it_is_one_of_ours(model_dir, config, expected):
    assert stored_dtype(replace(find_model(str(model_dir()), "--x"), config=config)) == expected
