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
    with_original,
)
from LLMPruner.evaluator.massive import RATIO
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


def test_broken_weights_are_not_run(monkeypatch):
    monkeypatch.setattr(health, "opened", lambda *args, **kwargs: pytest.fail("was loaded"))
    diagnosis = with_forward(unreadable("m.bin", RuntimeError("torn")), SimpleNamespace())
    assert errors(diagnosis) == [("file", "torn")] and diagnosis.findings[-1].severity == "info"
    assert report_text(diagnosis).startswith("UNHEALTHY: file: torn\n")


def test_a_stream_far_longer_than_in_the_dense_model_is_a_warning_that_names_its_layer(source, trained_dir):
    dense = find_model(str(trained_dir), "--original_model")
    diagnosis = diagnose_weights(source)
    found = with_original(diagnosis, source, dense, CommonConfig(dtype="float32", device="cpu"))
    assert found.healthy and [finding.severity for finding in found.findings] == ["info"] and len(found.stream_ratios) == 4
    assert all(0 < ratio < RATIO for ratio in found.stream_ratios) and found.as_dict()["stream_ratios"] == list(
        found.stream_ratios
    )
    rows = report_text(found).splitlines()
    assert rows[4].endswith("longest token") and rows[7].endswith(f"{found.stream_ratios[2]:.2f}x")
    assert "longest token" not in report_text(diagnosis)

    payload = torch.load(source.path, weights_only=True)
    payload["model.layers.2.mlp.down_proj.weight"] *= 1000
    torch.save(payload, source.path)
    spoiled = with_original(diagnose_weights(source), source, dense, CommonConfig(dtype="float32", device="cpu"))
    (finding,) = spoiled.findings
    assert (finding.severity, finding.where) == ("warning", "massive activations") and spoiled.healthy
    worst = max(spoiled.stream_ratios)
    assert spoiled.stream_ratios[:2] == found.stream_ratios[:2] and worst >= RATIO
    assert (
        finding.message.startswith(f"layer {spoiled.stream_ratios.index(worst)}: ") and f"{worst:.1f} times" in finding.message
    )


def test_the_dense_model_beside_itself_is_as_long_everywhere(trained_dir):
    dense = find_model(str(trained_dir), "--original_model")
    found = with_original(diagnose_weights(dense), dense, dense, CommonConfig(dtype="float32", device="cpu"))
    assert found.stream_ratios == (1.0,) * 4 and "none is false" in found.findings[0].message


def test_broken_weights_are_not_compared_to_the_dense_model(monkeypatch):
    monkeypatch.setattr(health, "opened", lambda *args, **kwargs: pytest.fail("was loaded"))
    diagnosis = unreadable("m.bin", RuntimeError("torn"))
    assert with_original(diagnosis, SimpleNamespace(), SimpleNamespace()) is diagnosis


def test_a_residual_stream_that_is_not_finite_is_an_error(source, monkeypatch):
    broken = [torch.ones(1, 3), torch.full((1, 3), torch.nan)]
    monkeypatch.setattr(health, "_stream_lengths", lambda *_: (broken, torch.zeros(1, 3, dtype=torch.long)))
    diagnosis = health.with_original(diagnose_weights(source), source, source)
    assert not diagnosis.healthy and "layer 1: the residual stream is not finite" in diagnosis.findings[-1].message
    assert diagnosis.as_dict()["stream_ratios"] == [], "JSON has no NaN"
