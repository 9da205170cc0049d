"""What the diagnosis finds, tensor by tensor and in the forward pass; the script's own behaviour is in test_diagnose_model."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from LLMPruner.config import CommonConfig
from LLMPruner.errors import DamagedError
from LLMPruner.evaluator import health
from LLMPruner.evaluator.health import (
    HUGE,
    Diagnosis,
    Finding,
    diagnose_forward,
    diagnose_weights,
    expected_shapes,
    shape_findings,
    tensor_findings,
    unreadable,
    with_forward,
)
from LLMPruner.evaluator.report import report_text
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan


def pruned_plan(geometry: Geometry) -> PruningPlan:
    """Layers 1 and 2 lose a KV group and channels; layers 0 and 3 stay whole."""
    plan = PruningPlan.dense(geometry)
    for index in (1, 2):
        plan = plan.with_layer(index, LayerPlan((index - 1,), tuple(range(index, 64))))
    return plan


@pytest.fixture
def source(trained_dir, tmp_path):
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    plan = pruned_plan(loaded.plan.geometry)
    apply_plan(LayerRunner.of(loaded.model), plan)
    save_model(tmp_path / "m.bin", LoadedModel(loaded.model, loaded.tokenizer, plan, {"parameters": plan.total_params}))
    return find_model(str(tmp_path / "m.bin"), "--model_path")


def errors(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(finding.where, finding.message) for finding in diagnosis.findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, math.nan, math.nan], "2 values are NaN"),
        ([1.0, -math.inf, 0.0], "1 values are infinite"),
        ([0.0, 0.0, 0.0], "zero"),
        ([1.0, -2 * HUGE, 0.0], "2e+04"),
    ],
)
def test_ill_values_are_found_in_any_precision(values, words):
    for dtype in (torch.float32, torch.bfloat16):
        (finding,) = tensor_findings("t.weight", torch.tensor(values, dtype=dtype))
        assert finding.severity == "error" and words in finding.message and finding.where == "t.weight"


def test_ordinary_values_and_zero_biases_are_no_errors():
    assert tensor_findings("t.weight", torch.tensor([0.0, -1.5, HUGE])) == []
    assert [finding.severity for finding in tensor_findings("q_proj.bias", torch.zeros(3))] == ["warning"]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_expected_shapes_are_those_of_the_sliced_model(changes):
    model = tiny_model(**changes)
    plan = pruned_plan(Geometry.from_config(model.config.to_dict()))
    apply_plan(LayerRunner.of(model), plan)
    actual = {name: tuple(value.shape) for name, value in model.named_parameters()}  # a tied head is named once
    assert expected_shapes(plan) == actual
    assert sum(math.prod(shape) for shape in actual.values()) == plan.total_params


def test_a_pruned_model_is_healthy_and_its_layers_are_told(source):
    diagnosis = diagnose_weights(source)
    assert diagnosis.healthy and diagnosis.findings == () and diagnosis.parameters == source.plan.total_params
    assert [(layer.kv_heads, layer.query_heads, layer.channels) for layer in diagnosis.layers] == [
        (2, 8, 96),
        (1, 4, 63),
        (1, 4, 62),
        (2, 8, 96),
    ]
    text = report_text(diagnosis).splitlines()
    assert text[0] == "HEALTHY" and f"{diagnosis.parameters:,}" in text[2]
    geometry = source.plan.geometry
    kept = geometry.unit_params("attention") + 63 * geometry.unit_params("mlp")
    share = kept / (geometry.sublayer_params("attention") + geometry.sublayer_params("mlp"))
    assert text[6].split() == ["1", "1", "of", "2", "4", "4:1", "63", "of", "96", f"{share:.1%}"]


def test_a_broken_ratio_names_its_layer(source):
    shapes = expected_shapes(source.plan)
    shapes["model.layers.1.self_attn.q_proj.weight"] = (3 * 8, 64)
    found = shape_findings(shapes, source.plan)
    assert ("layer 1", "Q:KV heads are 3:1, not 4:1") in [(finding.where, finding.message) for finding in found]
    assert any(finding.where.endswith("1.self_attn.q_proj.weight") for finding in found) and len(found) == 2


def test_a_missing_tensor_is_found(source):
    shapes = expected_shapes(source.plan)
    del shapes["model.norm.weight"]
    assert shape_findings(shapes, source.plan) == [Finding("error", "model.norm.weight", "is missing")]


def test_a_dense_directory_may_carry_old_rotary_tables_but_a_bin_no_stranger(trained_dir, tmp_path, source):
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    (tmp_path / "config.json").write_text((trained_dir / "config.json").read_text())
    save_file(load_file(trained_dir / "model.safetensors") | {extra: torch.ones(4)}, tmp_path / "model.safetensors")
    diagnosis = diagnose_weights(find_model(str(tmp_path), "--model_path"))
    assert diagnosis.healthy and [finding.where for finding in diagnosis.findings] == ["tokenizer"], "there is none here"
    payload = torch.load(source.path, weights_only=True)
    torch.save(payload | {"stranger": torch.ones(4)}, source.path)
    assert ("stranger", "is not part of the model that the config describes") in errors(diagnose_weights(source))


def test_the_record_of_the_run_must_agree(source):
    payload = torch.load(source.path, weights_only=True)
    for record, words in ((json.dumps({"parameters": 7}), "the record says 7"), ("[]", "not readable"), ("{", "not readable")):
        torch.save(payload | {"__provenance__": record}, source.path)
        ((_, message),) = errors(diagnose_weights(find_model(str(source.path), "--model_path")))
        assert words in message


def test_a_flipped_bit_fails_the_checksum(source):
    data = bytearray(source.path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of some tensor: torch alone would load it
    source.path.write_bytes(data)
    assert "checksum" in errors(diagnose_weights(source))[0][1]


def test_a_damaged_directory_is_a_finding(trained_dir, tmp_path):
    (tmp_path / "config.json").write_text((trained_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((trained_dir / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DamagedError, match="is damaged") as found:
        find_model(str(tmp_path), "--model_path", faulty=True)
    assert not unreadable(str(tmp_path), found.value).healthy


def test_the_forward_test_passes_a_trained_model_and_tells_its_text(source):
    found = with_forward(diagnose_weights(source), source, CommonConfig(dtype="float32", device="cpu")).findings
    assert all(finding.severity != "error" for finding in found if finding.where == "generation")
    assert any(finding.severity == "info" and finding.where == "generation" for finding in found)


def test_loss_is_the_one_of_transformers(trained_dir):
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    ids = torch.tensor([loaded.tokenizer(health.TEXT).input_ids[: 256 - health.NEW_TOKENS]])
    with torch.no_grad():
        ppl = loaded.model(input_ids=ids, labels=ids).loss.exp().item()
    assert f"PPL {ppl:.2f} " in diagnose_forward(loaded)[0].message


def test_a_model_worse_than_guessing_is_unhealthy(trained_dir):
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    loaded.model.lm_head.weight.data *= -3
    assert any(finding.severity == "error" and "worse than guessing" in finding.message for finding in diagnose_forward(loaded))


def test_logits_that_are_not_finite_are_unhealthy(trained_dir):
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    loaded.model.lm_head.weight.data[5, 3] = math.inf
    assert [finding.severity for finding in diagnose_forward(loaded)] == ["error"]


def test_a_cache_that_changes_the_text_is_unhealthy(trained_dir, monkeypatch):
    loaded = load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")
    attention = loaded.model.model.layers[0].self_attn
    forward = attention.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, past_key_values=None, **kwargs)  # sees the newest token only

    monkeypatch.setattr(attention, "forward", forgetful)
    assert any(finding.severity == "error" and "KV cache" in finding.message for finding in diagnose_forward(loaded))


def test_whatever_breaks_in_the_forward_pass_is_a_finding(source, monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("no such position")

    monkeypatch.setattr(health, "opened", broken)
    diagnosis = with_forward(diagnose_weights(source), source)
    assert errors(diagnosis) == [("forward", "IndexError: no such position")]


def test_what_the_machine_lacks_is_no_illness(source, monkeypatch):
    def large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(health, "opened", large)
    with pytest.raises(torch.OutOfMemoryError):
        with_forward(diagnose_weights(source), source)


def test_broken_weights_are_not_run(monkeypatch):
    monkeypatch.setattr(health, "opened", lambda *args, **kwargs: pytest.fail("was loaded"))
    diagnosis = with_forward(unreadable("m.bin", RuntimeError("torn")), SimpleNamespace())
    assert errors(diagnosis) == [("file", "torn")] and diagnosis.findings[-1].severity == "info"
    assert report_text(diagnosis).startswith("UNHEALTHY: file: torn\n")
