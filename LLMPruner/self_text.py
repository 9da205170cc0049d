"""Calibration text that the dense model writes itself: what one corpus does not cover, and no download.

A repair fitted on one corpus forgets what that corpus never shows. Text sampled from the model shows it again (LLM-QAT, Liu
et al. 2023; self-calibration, Williams et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlamaForCausalLM

BATCH_TOKENS = 32768  # written together: their cache takes 4 GB with Llama-3-8B in bfloat16


@torch.no_grad()
def write_windows(model: LlamaForCausalLM, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """`samples` windows of `seq_len` tokens, int64 `(samples, seq_len)`, sampled from `model` at temperature 1.

    Every window begins with a random token that the tokenizer knows, and is full: no end of text is sampled. The random
    state of the process stays as it was; the same seed writes the same windows on the same machine.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_length=seq_len,
        min_length=seq_len,  # an end of text would leave the window short
        pad_token_id=0,
        use_cache=True,
    )
    vocabulary = min(len(tokenizer), model.config.vocab_size)  # either may be padded
    device = model.get_input_embeddings().weight.device
    written, batch = [], max(1, BATCH_TOKENS // seq_len)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _generating_by(settings, model):
        torch.manual_seed(seed)
        for start in range(0, samples, batch):
            first = torch.randint(vocabulary, (min(batch, samples - start), 1)).to(device)
            text = model.generate(first, attention_mask=torch.ones_like(first))
            written.append(text.cpu())
    return torch.cat(written)


@contextmanager
def _generating_by(settings: GenerationConfig, model: LlamaForCausalLM) -> Iterator[None]:
    """The model with `settings` in place of its own: passed to `generate`, they would be filled up from its own."""
    theirs = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = theirs


def mixed(windows: torch.Tensor, written: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Both in random order, so that the windows that a repair holds out are of both kinds."""
    both = torch.cat([windows, written])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]
