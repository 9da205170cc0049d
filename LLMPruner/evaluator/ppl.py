"""Perplexity: the exponential of the mean next-token loss, token-weighted over non-overlapping windows."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from LLMPruner.data.corpora import describe
from LLMPruner.model.forward import LayerRunner

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

logger = logging.getLogger("LLMPruner")

CACHED_TOKENS = 1 << 14  # hidden states that go through the layers together; bounds memory, not the result


@dataclass(frozen=True)
class Perplexity:
    """One measured PPL and what it was measured on."""

    corpus: str
    split: str
    seq_len: int
    windows: int
    tokens: int
    ppl: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. PPL is None where the loss was not finite, which JSON cannot say."""
        return asdict(self) | {"ppl": self.ppl if math.isfinite(self.ppl) else None}


def perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Token-weighted PPL of `windows` `(n, seq_len)`; each predicts its last `seq_len - 1` tokens. NaN if the loss is."""
    runner = LayerRunner.of(model)
    step = max(1, CACHED_TOKENS // windows.shape[1])
    total = 0.0
    for part in tqdm(windows.split(step), desc="PPL", disable=None, leave=False):
        total += runner.head.losses(runner.layers(runner.embed(part)), part).sum().item()
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def measure(model: LlamaForCausalLM, windows: dict[str, torch.Tensor], label: str, split: str = "test") -> list[Perplexity]:
    """PPL on every corpus, logged one line each (`grep PPL` finds them)."""
    results = []
    for name, rows in windows.items():
        count, seq_len = rows.shape
        ppl = perplexity(model, rows)
        logger.info("PPL %s on %s %s: %.4f (%d windows of %d tokens)", label, describe(name), split, ppl, count, seq_len)
        results.append(Perplexity(name, split, seq_len, count, count * (seq_len - 1), ppl))
    return results
