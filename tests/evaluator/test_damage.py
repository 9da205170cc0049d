"""What the numbers of a damage say, and what they ask for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from LLMPruner.errors import UsageError
from LLMPruner.evaluator.damage import LARGE_KL, NEGLIGIBLE_KL, RATIO, Damage, DiagnosisConfig, next_step, spared

EVEN = Damage("text", 10, 0.0, (0.9,) * 4, (0.1, 0.2, 0.3, 0.4), (1.0, 1.2, 1.1, 1.0), kl=0.5)
KEPT = (0.75,) * 4


def test_increases_and_shares_are_what_each_layer_adds():
    damage = replace(EVEN, before=0.1, distances=(0.1, 0.5, 0.3, 0.5))
    assert damage.increases == pytest.approx((0.0, 0.4, -0.2, 0.2))
    assert damage.shares == pytest.approx((0.0, 2 / 3, 0.0, 1 / 3)) and damage.worst == 1  # what shrinks is no damage
    assert damage.longest == 1
    assert damage.as_dict()["layers"][1] == {
        "cosine": 0.9,
        "distance": 0.5,
        "increase": pytest.approx(0.4),
        "share": pytest.approx(2 / 3),
        "longest_token": 1.2,
    }
    assert replace(EVEN, distances=(0.0,) * 4).shares == (0.0,) * 4


def test_the_next_step_follows_from_the_numbers():
    assert "test_finetuning.py" in next_step(EVEN, KEPT)
    assert "--repair_samples" in next_step(replace(EVEN, ratios=(1.0, RATIO, 2.0, 1.0)), KEPT)
    assert next_step(replace(EVEN, kl=NEGLIGIBLE_KL / 2), KEPT).startswith("nothing")
    assert "lower --pruning_ratio" in next_step(replace(EVEN, kl=LARGE_KL), KEPT)
    one = replace(EVEN, distances=(0.0, 0.1, 0.4, 0.45), kl=LARGE_KL)  # a lower ratio is not what helps most
    assert "layer 2 holds 67%" in next_step(one, KEPT) and "--freeze_top_n_layers" in next_step(one, KEPT)
    whole = next_step(one, (0.75, 0.75, 1.0, 0.75))
    assert "layer 2 lost nothing" in whole and "--self_samples" in whole and "--freeze" not in whole


def test_a_layer_is_spared_by_the_flag_that_reaches_it():
    assert "--layer_start 1" in spared(0, 32) and "--layer_start 8" in spared(7, 32)
    assert "--layer_end 31," in spared(31, 32) and "--layer_end 24," in spared(24, 32)
    assert all("--freeze_top_n_layers" in spared(layer, 32) for layer in (8, 23))
    assert "--freeze_top_n_layers" in spared(1, 2)  # a quarter of two layers is none


def test_the_first_layer_that_is_not_finite_is_named():
    assert EVEN.broken is None
    assert replace(EVEN, ratios=(1.0, 1.0, math.inf, math.nan)).broken == 2
    assert replace(EVEN, cosines=(0.9, math.nan, 0.9, 0.9)).broken == 1
    assert replace(EVEN, kl=math.nan).broken == 3


@pytest.mark.parametrize(("settings", "words"), [({"samples": 0}, "--samples"), ({"seq_len": 1}, "--seq_len")])
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        DiagnosisConfig(**settings)
