"""Perplexity: the exponential of the mean next-token loss, token-weighted over non-overlapping windows."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from LLMPruner import parallel
from LLMPruner.cost import Cost, Setup
from LLMPruner.data.corpora import describe
from LLMPruner.model.forward import LayerRunner

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

logger = logging.getLogger("LLMPruner")


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

    @classmethod
    def of(cls, values: dict[str, Any]) -> Perplexity:
        """From the plain values of `as_dict`."""
        return cls(**values | {"ppl": math.nan if values["ppl"] is None else values["ppl"]})


def perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Token-weighted PPL of `windows` `(n, seq_len)`; each predicts its last `seq_len - 1` tokens. NaN if the loss is."""
    return perplexity_of(LayerRunner.of(model), windows)


def perplexity_of(runner: LayerRunner, windows: torch.Tensor) -> float:
    """`perplexity` of a runner's model, whose weights may lie on disk."""
    losses = []
    for part in tqdm(runner.passes(*windows.shape), desc="PPL", disable=parallel.quiet(), leave=False):
        losses.append(runner.head.losses(runner.layers(runner.embed(windows[part])), windows[part]))
    mean = parallel.gathered(torch.cat(losses)).sum().item() / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def measure(runner: LayerRunner, windows: dict[str, torch.Tensor], label: str, split: str = "test") -> list[Perplexity]:
    """PPL on every corpus, logged one line each (`grep PPL` finds them)."""
    results = []
    for name, rows in windows.items():
        count, seq_len = rows.shape
        ppl = perplexity_of(runner, rows)
        logger.info("PPL %s on %s %s: %.4f (%d windows of %d tokens)", label, describe(name), split, ppl, count, seq_len)
        results.append(Perplexity(name, split, seq_len, count, count * (seq_len - 1), ppl))
    return results


def cost(setup: Setup, label: str, windows: int, seq_len: int, corpora: int = 1, *, pruned: bool = False) -> Cost:
    """What measuring PPL on so many windows of each corpus costs."""
    mine = setup.mine(windows)
    tokens = corpora * mine * seq_len
    work = setup.forward(tokens, seq_len, pruned=pruned) + setup.head_work(tokens)
    batch = setup.batch(mine, seq_len)
    device = max(setup.activations(batch), setup.logits(batch))
    hidden = setup.hidden(setup.together(mine, seq_len), 2)
    return Cost(f"evaluate {label}", work, device, hidden, passes=corpora, head=True, pruned=pruned)
