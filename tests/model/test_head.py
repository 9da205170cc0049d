"""The head: losses, divergences and their gradients are those of all logits at once, of however few they are computed."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, each_architecture, random_windows, tiny_model
from torch.nn import functional

from LLMPruner.data.windows import IGNORED
from LLMPruner.model import head
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.head import Head
from LLMPruner.model.store import ResidentStore

WINDOWS = random_windows(5, 12)


def last_hidden(model, seed: int = 0) -> torch.Tensor:
    runner = LayerRunner.of(model)
    return runner.layers(runner.embed(random_windows(5, 12, seed)))


@torch.no_grad()
def log_probs(model, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden)).float().log_softmax(-1)


@each_architecture
def test_losses_are_summed_over_each_windows_tokens_but_the_first(changes):
    model = tiny_model(**changes)
    hidden = last_hidden(model)
    nll = -log_probs(model, hidden)[:, :-1].gather(-1, WINDOWS[:, 1:].unsqueeze(-1)).squeeze(-1)
    losses = Head(ResidentStore(model)).losses(hidden, WINDOWS)
    assert losses.dtype == torch.float64 and losses.shape == (5,) and losses.device.type == "cpu"
    torch.testing.assert_close(losses, nll.double().sum(1), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_loss_is_that_of_autograd_and_nothing_flows_from_the_last_token():
    model = tiny_model()
    hidden = last_hidden(model)
    gradient = Head(ResidentStore(model)).loss_gradient(hidden, WINDOWS)
    leaf = hidden.clone().requires_grad_()
    logits = model.lm_head(model.model.norm(leaf))[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert not gradient[:, -1].any() and gradient[:, :-1].any()


def test_the_divergence_is_the_mean_over_tokens_and_nothing_from_itself():
    model = tiny_model()
    head, hidden, reference = Head(ResidentStore(model)), last_hidden(model), last_hidden(model, seed=1)
    ours, theirs = log_probs(model, hidden), log_probs(model, reference)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert head.divergence(hidden, reference) == pytest.approx(expected, rel=1e-5) and expected > 0.01
    assert abs(head.divergence(hidden, hidden)) < 1e-6
    known = head.log_probs(reference)
    torch.testing.assert_close(known, theirs)
    assert head.divergence_from(hidden, known) == head.divergence(hidden, reference), "to the last digit"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_teaching_gradient_is_that_of_autograd(share):
    """Of the divergence, and of the labels where there are any."""
    model = tiny_model()
    runner = LayerRunner.of(model)
    reference, hidden = runner.layers(runner.embed(WINDOWS)).flatten(0, 1).split(20)[:2]
    leaf, labels = hidden.clone().requires_grad_(), torch.arange(20)
    labels[3] = labels[8] = IGNORED
    gradient = runner.head.teaching_gradient(hidden, reference, labels, share)
    assert all(weight.grad is None for weight in model.parameters()), "nor is the head's, which no pruning changes"
    ours, theirs = (model.lm_head(model.model.norm(rows)).log_softmax(-1) for rows in (leaf, reference))
    divergence, own = (theirs.exp() * (theirs - ours)).sum(-1), share * (labels != IGNORED)
    entropy = functional.nll_loss(ours, labels, ignore_index=IGNORED, reduction="none")
    loss = ((1 - own) * divergence + own * entropy).mean()
    loss.backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert runner.head.teaching_loss(hidden, reference, labels, share) == pytest.approx(loss.item(), rel=1e-5)


def test_what_is_taught_lies_anywhere_and_is_wider_than_the_model():
    """Hidden states of a streamed model lie beside its device, and those of layers that learn are float32."""
    model = tiny_model()
    wide, reference = LayerRunner.of(model).layers(LayerRunner.of(model).embed(WINDOWS)).flatten(0, 1).split(20)[:2]
    head = LayerRunner.of(model.to(torch.bfloat16)).head
    labels, moved = torch.arange(20), []
    losses = [head.teaching_loss(rows, reference, labels, 0.5) for rows in (wide, wide.bfloat16())]
    assert losses[0] == pytest.approx(losses[1])
    original = head._logits
    head._logits = lambda rows: moved.append(rows.shape) or original(rows)
    head.teaching_loss(wide, reference, labels, 1.0)
    assert len(moved) == 2, "one place brings rows to the device"


@pytest.mark.parametrize("rows", [1, 7])
def test_chunking_the_logits_changes_neither_losses_nor_gradients(monkeypatch, rows):
    model = tiny_model()
    runner = LayerRunner.of(model)
    hidden = runner.layers(runner.embed(WINDOWS))
    losses, gradient = runner.head.losses(hidden, WINDOWS), runner.head.loss_gradient(hidden, WINDOWS)
    gates = gathered_gates(runner)
    other = hidden.roll(1, 0)
    divergence, lesson = runner.head.divergence(other, hidden), (other[0], hidden[0], WINDOWS[0], 0.5)
    slope = runner.head.teaching_gradient(*lesson)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    monkeypatch.setattr(head, "LOGIT_ELEMENTS_CPU", rows * VOCAB)
    torch.testing.assert_close(runner.head.losses(hidden, WINDOWS), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(runner.head.loss_gradient(hidden, WINDOWS), gradient)
    assert runner.head.divergence(other, hidden) == pytest.approx(divergence, rel=1e-5)
    torch.testing.assert_close(runner.head.teaching_gradient(*lesson), slope)
    for got, wanted in zip(gathered_gates(runner), gates, strict=True):
        torch.testing.assert_close(got, wanted)
    assert max(seen) == rows


def gathered_gates(runner: LayerRunner) -> list[tuple[torch.Tensor, ...]]:
    """Gate gradients, which begin at the head; a single batch, from the last layer to the first."""
    gates: list[tuple[torch.Tensor, ...]] = []
    runner.gate_gradients(WINDOWS, lambda _, pair: gates.append(pair))
    return gates


@pytest.mark.parametrize("batch_tokens", [1, 24, 10**6])
def test_the_batch_size_changes_no_loss(batch_tokens):
    model = tiny_model()
    hidden, store = last_hidden(model), ResidentStore(model)
    losses = Head(store, batch_tokens=batch_tokens).losses(hidden, WINDOWS)
    torch.testing.assert_close(losses, Head(store).losses(hidden, WINDOWS), rtol=1e-5, atol=1e-5)


def test_hidden_states_wider_than_the_model_are_read_in_its_precision():
    model = tiny_model().bfloat16()
    hidden, reference = last_hidden(model), last_hidden(model, seed=1)
    head = Head(ResidentStore(model))
    assert head.divergence(hidden.float(), reference) == head.divergence(hidden, reference) > 0
