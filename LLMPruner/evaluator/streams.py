"""A pruned model beside its dense one on the same windows, both going through their layers in lock-step.

Layer after layer, one hidden state of each model is alive. Where both do not fit the device, the second is streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from LLMPruner.config import CommonConfig
from LLMPruner.data.windows import bos_token, load_windows
from LLMPruner.evaluator.damage import RATIO, Damage, DiagnosisConfig, next_step
from LLMPruner.evaluator.health import DEFAULTS, TEXT, Diagnosis, Finding
from LLMPruner.evaluator.massive import largest_ratios
from LLMPruner.model.hidden import fetch
from LLMPruner.model.load import opened
from LLMPruner.model.source import ModelSource, check_token_ids
from LLMPruner.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from LLMPruner.model.forward import LayerRunner

BUILT_IN, SHORT = "a short built-in text", DiagnosisConfig()
Columns = list[torch.Tensor]  # cosines, relative distances, our lengths, dense lengths: each of all tokens so far


def with_original(
    diagnosis: Diagnosis,
    source: ModelSource,
    original: ModelSource,
    common: CommonConfig = DEFAULTS,
    text: DiagnosisConfig = SHORT,
) -> Diagnosis:
    """The diagnosis with the comparison to the dense model added; broken weights are not run."""
    if not diagnosis.healthy:
        finding = Finding("info", "damage", "not compared with the dense model, because the weights are broken")
        return replace(diagnosis, findings=(*diagnosis.findings, finding))
    windows = diagnosis_windows(original, common, text)
    check_token_ids(source, "--model_path", windows)
    with opened(original, common) as dense, opened(source, common) as ours:
        damage = compare_streams(ours.runner, dense.runner, windows, text.dataset or BUILT_IN)
    if damage.broken is not None:
        told = f"layer {damage.broken}: the residual stream is not finite: try --dtype float32"
        return replace(diagnosis, findings=(*diagnosis.findings, Finding("error", "damage", told)))
    findings = damage_findings(damage, str(original.path), diagnosis)
    return replace(diagnosis, damage=damage, findings=(*diagnosis.findings, *findings))


def diagnosis_windows(original: ModelSource, common: CommonConfig, text: DiagnosisConfig) -> torch.Tensor:
    """Token windows `(n, seq_len)` by the dense model's tokenizer: of the corpus, or the built-in text as one window.

    Windows begin with BOS where the tokenizer adds it, as a prompt does: massive activations sit on the first token.
    """
    tokenizer = load_tokenizer(original)
    if text.dataset is None:
        return torch.tensor([tokenizer(TEXT).input_ids[: original.geometry.max_positions]])
    return load_windows(
        tokenizer,
        text.dataset,
        "test",
        seq_len=text.seq_len,
        samples=text.samples,
        data_dir=common.data_dir,
        text_format=common.text_format,
        bos=bos_token(tokenizer, "auto"),
    )


def damage_findings(damage: Damage, original: str, diagnosis: Diagnosis) -> list[Finding]:
    """The longest token, where the damage sits, and the next step."""
    longest, worst = damage.longest, damage.worst
    false = damage.ratios[longest] >= RATIO
    verdict = "a false massive activation" if false else "none is false"
    told = (
        f"layer {longest}: a token's residual stream is {damage.ratios[longest]:.1f} times as long as in {original} ({verdict})"
    )
    sits = f"KL {damage.kl:.4f} nats a token on {damage.tokens:,} tokens of {damage.text}"
    if damage.shares[worst]:
        sits += f"; the largest part of it arises in layer {worst}, which adds {damage.shares[worst]:.0%} of the distance"
    return [
        Finding("warning" if false else "info", "massive activations", told),
        Finding("info", "damage", sits),
        Finding("info", "next step", next_step(damage, diagnosis.kept)),
    ]


@torch.no_grad()
def compare_streams(ours: LayerRunner, dense: LayerRunner, windows: torch.Tensor, text: str = "") -> Damage:
    """The damage on `windows` `(n, seq_len)`. Float32 per token, means over all tokens in float64.

    Where either model is streamed all windows go through together, so that its layers are read once.
    """
    layers: list[Columns] = [[torch.empty(0)] * 4 for _ in range(ours.num_layers + 1)]
    kl = 0.0
    for part in min((runner.passes(*windows.shape) for runner in (ours, dense)), key=len):
        rows = windows[part]
        for index, states in enumerate(_in_step(ours, dense, rows)):
            columns = _columns(ours, *states)
            layers[index] = [torch.cat(pair) for pair in zip(layers[index], columns, strict=True)]
        kl += ours.head.divergence(*states, head=dense.head) * rows.numel()
    means = [tuple(column.double().mean().item() for column in columns[:2]) for columns in layers]
    ratios = largest_ratios([columns[2] for columns in layers[1:]], [columns[3] for columns in layers[1:]])
    cosines, distances = zip(*means[1:], strict=True)
    return Damage(text, windows.numel(), means[0][1], cosines, distances, tuple(ratios), kl / windows.numel())


def _in_step(ours: LayerRunner, dense: LayerRunner, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states of both models before layer 0 and after every layer."""
    states = ours.embed(windows), dense.embed(windows)
    yield states
    for index in range(ours.num_layers):
        states = ours.layer(index, states[0]), dense.layer(index, states[1])
        yield states


def _columns(runner: LayerRunner, ours: torch.Tensor, dense: torch.Tensor) -> Columns:
    """Cosine, relative distance, and both root mean squares of every token, float32 `(tokens,)` each, on the CPU."""
    found = []
    for part in runner.batches(*ours.shape[:2]):
        one, other = (fetch(states, part, runner.device).float().flatten(0, 1) for states in (ours, dense))
        length = other.square().mean(-1).sqrt()
        distance = (one - other).square().mean(-1).sqrt() / length.clamp_min(1e-12)
        cosine = functional.cosine_similarity(one, other, dim=-1)
        found.append([column.cpu() for column in (cosine, distance, one.square().mean(-1).sqrt(), length)])
    return [torch.cat(columns) for columns in zip(*found, strict=True)]
