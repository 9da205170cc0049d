"""False massive activations: tokens whose residual stream is far longer in a pruned model than in the dense one.

A trained Llama has a few massive activations of its own (Sun et al. 2024); what pruning adds to them spoils every later layer,
and a perplexity may hide it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from LLMPruner.model.forward import LayerRunner


@torch.no_grad()
def lengths_and_last(runner: LayerRunner, windows: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Root mean squares of the residual stream after every layer, float32 `(n, seq_len)` each, on the CPU, and the hidden
    states after the last layer `(n, seq_len, hidden)`."""
    hidden, lengths = runner.embed(windows), []
    for index in range(runner.num_layers):
        hidden = runner.layer(index, hidden)
        lengths.append(hidden.float().square().mean(-1).sqrt().cpu())
    return lengths, hidden


def largest_ratios(lengths: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> list[float]:
    """Per layer, how many times as long as in the dense model the residual stream of a token is at most."""
    return [(ours / theirs.clamp_min(1e-12)).max().item() for ours, theirs in zip(lengths, dense, strict=True)]
