"""Perplexity: the exponential of the mean next-token loss, token-weighted over windows.

Windows lie side by side, and of each all tokens but the first are predicted. Or they overlap (transformers' "Perplexity of
fixed-length models"): each is moved by `stride` tokens, and its last `stride` tokens count, which have `seq_len - stride` or
more before them; of the first window all do. The last window has what is left of the text (data/windows.py). So every token
but the first counts once; where some of the windows are drawn, those of these. The guide's own loop divides by a token less a
window; here sums are divided by what was summed.
"""

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
from LLMPruner.data.windows import IGNORED
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
    stride: int | None = None  # tokens from window to window; None: side by side

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


def perplexity_of(runner: LayerRunner, windows: torch.Tensor, stride: int | None = None) -> float:
    """`perplexity` of a runner's model, whose weights may lie on disk; with `stride`, of overlapping windows."""
    last, losses = _last(windows.shape[1], stride), []
    for part in tqdm(runner.passes(*windows.shape), desc="PPL", disable=parallel.quiet(), leave=False):
        hidden = runner.layers(runner.embed(windows[part].clamp(min=0)))  # after the text any token will do: none sees it
        losses.append(runner.head.losses(hidden[:, -last - 1 :], windows[part, -last - 1 :]))
        if part.start == 0 and last < windows.shape[1] - 1:  # the first of all, whose other tokens count as well
            losses.append(runner.head.losses(hidden[:1, :-last], windows[:1, :-last]))
    mean = parallel.gathered(torch.cat(losses)).sum().item() / scored_tokens(windows, stride)
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def scored_tokens(windows: torch.Tensor, stride: int | None = None) -> int:
    """Tokens that count in windows `(n, seq_len)`."""
    last = _last(windows.shape[1], stride)
    return int(windows[:, -last:].ne(IGNORED).sum()) + windows.shape[1] - 1 - last


def _last(seq_len: int, stride: int | None) -> int:
    """Tokens that count at the end of each window."""
    return seq_len - 1 if stride is None else min(stride, seq_len - 1)


def measure(
    runner: LayerRunner, windows: dict[str, torch.Tensor], label: str, split: str = "test", stride: int | None = None
) -> list[Perplexity]:
    """PPL on every corpus, logged one line each (`grep PPL` finds them)."""
    results = []
    for name, rows in windows.items():
        count, seq_len = rows.shape
        ppl = perplexity_of(runner, rows, stride)
        where = f"{describe(name)} {split}" if stride is None else f"{describe(name)} {split}, stride {stride}"
        logger.info("PPL %s on %s: %.4f (%d windows of %d tokens)", label, where, ppl, count, seq_len)
        results.append(Perplexity(name, split, seq_len, count, scored_tokens(rows, stride), ppl, stride))
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
