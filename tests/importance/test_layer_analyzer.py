"""Layer scores: the cached prefix equals the naive way, and a saved file belongs to one model only."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import each_architecture, random_windows, tiny_model
from torch import nn
from torch.nn import functional

from LLMPruner.errors import UsageError
from LLMPruner.importance.layer_analyzer import (
    LAYER_METHODS,
    LayerImportance,
    activation,
    analyze_layers,
    block_influence,
    removal,
)
from LLMPruner.model.forward import LayerRunner

WINDOWS = random_windows(6, 16)
SAVED = LayerImportance((0.5, -0.25, 1e-9, 3.0), "removal", 6, 16, "ptb", "train", 42, "abc")


class Bypass(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden_states, **_):
        return hidden_states


@torch.no_grad()
def mean_loss(model) -> float:
    logits = model(WINDOWS).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).double(), WINDOWS[:, 1:].flatten()).item()


@each_architecture
def test_removal_with_a_cached_prefix_equals_running_the_model_without_the_layer(changes):
    model = tiny_model(**changes)
    base, naive = mean_loss(model), []
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Bypass()
        naive.append(mean_loss(model) - base)
        model.model.layers[index] = layer
    assert removal(LayerRunner.of(model, batch_tokens=40), WINDOWS) == pytest.approx(naive, abs=1e-5)
    assert max(naive) - min(naive) > 1e-3, "scores must differ, or this test proves nothing"


def test_removal_costs_half_a_forward_a_layer():
    model, calls = tiny_model(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    removal(LayerRunner.of(model), WINDOWS)
    layers = len(model.model.layers)
    assert len(calls) == layers * (layers - 1) // 2 + layers


def silent_layer() -> LayerRunner:
    """Layer 2 of a tiny model adds nothing to the residual stream."""
    model = tiny_model()
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    return LayerRunner.of(model)


@pytest.mark.parametrize("method", sorted(LAYER_METHODS))
def test_a_layer_that_does_nothing_scores_zero_and_no_other_does(method):
    scores = LAYER_METHODS[method](silent_layer(), WINDOWS)
    assert len(scores) == 4 and scores[2] == pytest.approx(0, abs=1e-6)
    assert all(abs(score) > 1e-5 for index, score in enumerate(scores) if index != 2)


@torch.no_grad()
def test_block_influence_and_activation_are_their_definitions():
    model = tiny_model()
    states = list(model(WINDOWS, output_hidden_states=True).hidden_states)[:4]  # the last one is normed
    cosine, change = [], []
    for before, after in zip(states, states[1:], strict=False):
        cosine.append((1 - functional.cosine_similarity(before, after, dim=-1)).mean().item())
        change.append(((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item())
    assert block_influence(LayerRunner.of(model), WINDOWS)[:3] == pytest.approx(cosine, abs=1e-5)
    assert activation(LayerRunner.of(model), WINDOWS)[:3] == pytest.approx(change, rel=1e-4)


def test_analysis_records_what_it_was_measured_on():
    record = {"corpus": "ptb", "split": "train", "seed": 7, "fingerprint": "f"}
    found = analyze_layers(LayerRunner.of(tiny_model()), WINDOWS, "block_influence", **record)
    assert (found.method, found.samples, found.seq_len) == ("block_influence", 6, 16)
    assert found == replace(found, **record) and len(found.scores) == 4


def test_saved_scores_come_back_to_the_last_bit(tmp_path):
    path = tmp_path / "layer_importance_config.json"
    SAVED.save(path)
    assert LayerImportance.load(path, "abc", 4) == SAVED


def saved(**changes) -> str:
    return json.dumps(SAVED.__dict__ | changes)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (saved(fingerprint="other"), "made for another model"),
        (saved(scores=[1.0, 2.0, 3.0]), "made for another model"),
        ("not json", "is not JSON"),
        ("[1, 2]", "not a layer importance file"),
        ("{}", "not a layer importance file"),
        (saved(scores=None), "not a layer importance file"),
        (saved(scores=["a"] * 4), "not a layer importance file"),
        (saved(surprise=1), "not a layer importance file"),
        (saved(scores=[1.0, 2.0, float("nan"), 3.0]), "not finite"),
        (saved(scores=[1.0, 2.0, float("inf"), 3.0]), "not finite"),
    ],
)
def test_a_file_that_does_not_belong_here_is_refused(tmp_path, text, complaint):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"--layer_importance_config .*{complaint}"):
        LayerImportance.load(path, "abc", 4)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--layer_importance_config .* does not exist"):
        LayerImportance.load(tmp_path / "none.json", "abc", 4)
