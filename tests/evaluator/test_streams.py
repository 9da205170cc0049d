"""Damage that was planted is found in its layer; none where there is none; streamed as in memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import random_windows, tiny_model
from torch.nn import functional

from LLMPruner.config import CommonConfig
from LLMPruner.evaluator import health, streams
from LLMPruner.evaluator.damage import RATIO, DiagnosisConfig
from LLMPruner.evaluator.health import diagnose_weights, unreadable
from LLMPruner.evaluator.report import report_text
from LLMPruner.evaluator.streams import compare_streams, with_original
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan

WINDOWS = random_windows(5, 12)
PLAIN = CommonConfig(dtype="float32", device="cpu")


def runner_of(model) -> LayerRunner:
    return LayerRunner.of(model, batch_tokens=24)  # three batches, the last one short


@pytest.fixture
def dense(trained_dir):
    return find_model(str(trained_dir), "--original_model")


@pytest.fixture
def source(dense, tmp_path):
    """The trained model without half of layer 2's channels."""
    loaded = load_model(dense, dtype="float32", device="cpu")
    plan = PruningPlan.dense(dense.geometry).with_layer(2, LayerPlan((0, 1), tuple(range(48))))
    apply_plan(LayerRunner.of(loaded.model), plan)
    save_model(tmp_path / "m.bin", LoadedModel(loaded.model, loaded.tokenizer, plan, {"parameters": plan.total_params}))
    return find_model(str(tmp_path / "m.bin"), "--model_path")


def test_a_model_beside_itself_is_undamaged():
    model = tiny_model()
    damage = compare_streams(runner_of(model), runner_of(tiny_model()), WINDOWS)
    assert damage.distances == (0.0,) * 4 and damage.before == 0.0 and damage.ratios == (1.0,) * 4
    assert damage.cosines == pytest.approx((1.0,) * 4) and damage.kl == pytest.approx(0.0, abs=1e-9)
    assert damage.tokens == 60


@torch.no_grad()
def test_the_figures_are_those_of_the_models_own_hidden_states():
    ours, dense = tiny_model(0), tiny_model(1)
    states = [model(WINDOWS, output_hidden_states=True) for model in (ours, dense)]
    damage = compare_streams(runner_of(ours), runner_of(dense), WINDOWS)
    for index, column in ((0, None), (1, 0), (3, 2)):  # transformers' last one is after the final norm
        one, other = (state.hidden_states[index] for state in states)
        distance = ((one - other).norm(dim=-1) / other.norm(dim=-1)).mean().item()
        assert distance == pytest.approx(damage.before if column is None else damage.distances[column], rel=1e-5)
        if column is not None:
            assert damage.cosines[column] == pytest.approx(functional.cosine_similarity(one, other, -1).mean().item(), abs=1e-6)
            assert damage.ratios[column] == pytest.approx((one.norm(dim=-1) / other.norm(dim=-1)).max().item(), rel=1e-5)
    one, other = (state.logits.log_softmax(-1) for state in states)  # each through its own head
    assert damage.kl == pytest.approx(functional.kl_div(one, other, reduction="sum", log_target=True).item() / 60, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_damage_planted_in_one_layer_is_named(layer):
    dense, damaged = tiny_model(), tiny_model()
    damaged.model.layers[layer].mlp.down_proj.weight.normal_(generator=torch.Generator().manual_seed(1))
    damage = compare_streams(runner_of(damaged), runner_of(dense), WINDOWS)
    assert damage.worst == layer and damage.shares[layer] > 0.5
    assert damage.distances[:layer] == (0.0,) * layer and damage.distances[layer] > 0.1


def test_a_pruned_layer_is_told_in_the_report(source, dense):
    diagnosis = diagnose_weights(source)
    found = with_original(diagnosis, source, dense, PLAIN)
    assert found.healthy and [finding.where for finding in found.findings] == ["massive activations", "damage", "next step"]
    assert all(finding.severity == "info" for finding in found.findings) and found.damage.worst == 2
    assert "the largest part of it arises in layer 2" in found.findings[1].message
    rows = report_text(found).splitlines()
    assert rows[4].split()[-5:] == ["cosine", "distance", "increase", "longest", "token"]
    wanted = found.damage.cosines[2], found.damage.distances[2], found.damage.increases[2], found.damage.ratios[2]
    assert rows[7].split()[-4:] == [f"{wanted[0]:.4f}", f"{wanted[1]:.3f}", f"{wanted[2]:+.3f}", f"{wanted[3]:.2f}x"]
    assert "cosine" not in report_text(diagnosis) and diagnosis.as_dict()["damage"] is None


def test_a_planted_massive_token_is_a_warning_that_names_its_layer(source, dense):
    before = with_original(diagnose_weights(source), source, dense, PLAIN).damage.ratios
    payload = torch.load(source.path, weights_only=True)
    payload["model.layers.2.mlp.down_proj.weight"] *= 1000
    torch.save(payload, source.path)
    spoiled = with_original(diagnose_weights(source), source, dense, PLAIN)
    massive, _, step = spoiled.findings
    ratios = spoiled.damage.ratios
    assert massive.severity == "warning" and massive.where == "massive activations" and spoiled.healthy
    assert ratios[:2] == before[:2] and max(ratios) >= RATIO
    assert massive.message.startswith(f"layer {ratios.index(max(ratios))}: ") and f"{max(ratios):.1f} times" in massive.message
    assert "--repair_samples" in step.message and "--self_samples" in step.message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_it_is_the_same(source, dense, data_dir, dtype):
    text = DiagnosisConfig(dataset="wikitext2", samples=3, seq_len=24)
    found = []
    for stream in ("off", "on"):
        common = CommonConfig(dtype=dtype, device="cpu", stream=stream, data_dir=str(data_dir))
        found.append(with_original(diagnose_weights(source), source, dense, common, text).damage)
    assert found[0] == found[1] and found[0].tokens == 72 and found[0].kl > 0


def test_in_several_batches_it_is_the_same_as_streamed_in_one_pass():
    ours, dense = tiny_model(0), tiny_model(1)
    whole = LayerRunner.of(ours), LayerRunner.of(dense)
    whole[1].store.resident = False  # as a streamed one asks: all windows go through together
    apart, together = (compare_streams(*pair, WINDOWS) for pair in ((runner_of(ours), runner_of(dense)), whole))
    assert apart.distances == pytest.approx(together.distances, rel=1e-6) and apart.kl == pytest.approx(together.kl, rel=1e-5)


def test_a_text_of_several_tokens_begins_as_a_prompt_does(dense, data_dir, monkeypatch):
    common = CommonConfig(data_dir=str(data_dir))
    assert streams.diagnosis_windows(dense, common, DiagnosisConfig()).shape[0] == 1
    monkeypatch.setattr(streams, "bos_token", lambda *_: 0)
    windows = streams.diagnosis_windows(dense, common, DiagnosisConfig(dataset="ptb", samples=3, seq_len=16))
    assert windows.shape == (3, 16) and windows[:, 0].eq(0).all()


def test_broken_weights_are_not_compared(monkeypatch):
    monkeypatch.setattr(streams, "opened", lambda *args, **kwargs: pytest.fail("was loaded"))
    found = with_original(unreadable("m.bin", RuntimeError("torn")), SimpleNamespace(), SimpleNamespace())
    assert found.damage is None and found.findings[-1].where == "damage" and "not compared" in found.findings[-1].message


def test_a_residual_stream_that_is_not_finite_is_an_error(source, dense):
    payload = torch.load(source.path, weights_only=True)
    payload["model.layers.1.mlp.down_proj.weight"] *= health.HUGE
    payload["model.layers.1.mlp.up_proj.weight"] *= health.HUGE
    torch.save({name: value.half() if torch.is_tensor(value) else value for name, value in payload.items()}, source.path)
    healthy = unreadable(str(source.path), RuntimeError("torn"))
    healthy = health.replace(healthy, findings=(), plan=source.plan)
    diagnosis = with_original(healthy, source, dense, CommonConfig(dtype="float16", device="cpu"))
    assert not diagnosis.healthy and "layer 1: the residual stream is not finite" in diagnosis.findings[-1].message
    assert diagnosis.as_dict()["damage"] is None, "JSON has no NaN"
