"""The loss of a batch against the plain way: all logits at once, torch's own losses, autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, tiny_model
from torch.nn import functional

from LLMPruner.data.windows import IGNORED
from LLMPruner.model import head
from LLMPruner.trainer.loss import Student
from LLMPruner.training_config import DistillConfig

DISTILL = DistillConfig(distill=True, distill_alpha=0.7, distill_temperature=2.0)


@pytest.fixture(autouse=True)
def few_tokens_a_chunk(monkeypatch):
    monkeypatch.setattr(head, "LOGIT_ELEMENTS_CPU", 7 * tiny_model().config.vocab_size)  # the last chunk is a part of one


def batch():
    ids = random_windows(3, 16)
    labels = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    labels[1, 3:9] = IGNORED
    return ids, labels


def plain(model, teacher, config, ids, labels):
    """What is trained on, cross-entropy and divergence."""
    logits, keep = model(input_ids=ids).logits, labels != IGNORED
    entropy = functional.cross_entropy(logits[keep], labels[keep], reduction="sum")
    if teacher is None:
        return entropy, entropy, torch.tensor(0.0)
    with torch.no_grad():
        theirs = functional.log_softmax(teacher(input_ids=ids).logits[keep] / config.distill_temperature, -1)
    ours = functional.log_softmax(logits[keep] / config.distill_temperature, -1)
    divergence = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    scale = config.distill_alpha * config.distill_temperature**2
    return (1 - config.distill_alpha) * entropy + scale * divergence, entropy, divergence


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(tied, taught):
    model, ids_labels = tiny_model(tie_word_embeddings=tied), batch()
    teacher = tiny_model(seed=1) if taught else None
    expected = plain(model, teacher, DISTILL, *ids_labels)
    (expected[0] * 3).backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    found = Student(model, DISTILL, teacher)(*ids_labels)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)
    (found[0] * 3).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_without_gradients_none_are_made():
    model, (ids, labels) = tiny_model(), batch()
    with torch.no_grad():
        found = Student(model, DISTILL)(ids, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found[0], plain(model, None, DISTILL, ids, labels)[0].detach(), rtol=1e-5, atol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_what_is_below_it_does():
    model, (ids, labels) = tiny_model(), batch()
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    Student(model, DISTILL)(ids, labels)[0].backward()
    assert model.lm_head.weight.grad is None and model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_drawn_answers_estimate_the_divergence_and_its_gradient_without_bias():
    model, teacher, (ids, labels) = tiny_model(), tiny_model(seed=1), batch()
    expected = plain(model, teacher, DISTILL, ids, labels)
    expected[0].backward()
    wanted = model.lm_head.weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        theirs = functional.log_softmax(teacher(input_ids=ids).logits / DISTILL.distill_temperature, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(theirs.exp().flatten(0, 1), 20_000, replacement=True, generator=generator)
    drawn = {"tokens": drawn.view(*ids.shape, -1).int(), "entropy": -(theirs.exp() * theirs).sum(-1)}
    found = Student(model, DISTILL)(ids, labels, **drawn)
    assert found[2].item() == pytest.approx(expected[2].item(), rel=0.05)
    found[0].backward()
    assert (model.lm_head.weight.grad - wanted).norm() < 0.05 * wanted.norm()
