"""False massive activations are found where they are planted, and not where there are none."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, tiny_model

from LLMPruner.evaluator.massive import largest_ratios, lengths_and_last
from LLMPruner.model.forward import LayerRunner

WINDOWS = random_windows(2, 12)


def test_lengths_are_those_of_the_models_hidden_states():
    model = tiny_model()
    states = model(WINDOWS, output_hidden_states=True).hidden_states
    lengths, last = lengths_and_last(LayerRunner.of(model), WINDOWS)
    assert len(lengths) == 4 and lengths[0].shape == WINDOWS.shape
    torch.testing.assert_close(lengths[1], states[2].square().mean(-1).sqrt())
    torch.testing.assert_close(model.model.norm(last), states[-1])


def test_a_model_has_no_false_ones_beside_itself():
    runner = LayerRunner.of(tiny_model())
    assert largest_ratios(lengths_and_last(runner, WINDOWS)[0], lengths_and_last(runner, WINDOWS)[0]) == [1.0] * 4


@torch.no_grad()
def test_a_planted_one_is_found_in_its_layer_and_those_after():
    dense, spoiled = tiny_model(), tiny_model()
    spoiled.model.layers[2].mlp.down_proj.weight *= 1e4
    ratios = largest_ratios(*(lengths_and_last(LayerRunner.of(model), WINDOWS)[0] for model in (spoiled, dense)))
    assert ratios[:2] == pytest.approx([1.0, 1.0]) and ratios[2] > 10 and ratios[3] > 10
