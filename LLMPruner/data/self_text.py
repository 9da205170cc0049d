"""Calibration text that the dense model writes itself: what one corpus does not cover, and no download.

A repair fitted on one corpus, or a plan searched on it, forgets what that corpus never shows. Text sampled from the model shows
it again (LLM-QAT, Liu et al. 2023; self-calibration, Williams et al. 2024).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

logger = logging.getLogger("LLMPruner")

# Without cuDNN's, which torch leaves out of its deterministic mode: a token drawn otherwise is another text. Not that mode as a
# whole, for it refuses operations, and which of them a model calls is up to transformers.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BATCH_TOKENS = 32768  # written together: their cache takes 4 GB with Llama-3-8B in bfloat16


class _BufferedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of their final size, `(n, KV heads, size, head_dim)`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.buffers = size, ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values; returns those of all tokens so far, as views of the buffers."""
        if not self.buffers:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            self.buffers = tuple(states.new_empty(batch, heads, self.size, width) for states in (key_states, value_states))
        start = self.keys.shape[-2] if self.keys.numel() else 0
        stop = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values


@torch.no_grad()
def write_windows(
    model: LlamaForCausalLM, tokenizer: Any, *, samples: int, seq_len: int, seed: int, bos: int | None = None
) -> torch.Tensor:
    """`samples` windows of `seq_len` tokens, int64 `(samples, seq_len)`, sampled from `model` at temperature 1.

    Every window begins with `bos`, or else with a random token that the tokenizer knows, and is full: after an end of text the
    model goes on as in its training. The same seed writes the same windows on the same machine.
    """
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = min(len(tokenizer), model.config.vocab_size)  # either may be padded
    if bos is None:
        first = _random_tokens(tokenizer, samples, vocabulary, generator)
    else:
        first = torch.full((samples, 1), bos, device=device)
    size = max(1, BATCH_TOKENS // seq_len)
    progress = tqdm(total=samples * seq_len, desc="write", unit="token", disable=None, leave=False)
    with progress, sdpa_kernel(ATTENTION):
        written = [_continued(model, part, seq_len, vocabulary, generator, progress) for part in first.split(size)]
    logger.info("data: the dense model wrote %d windows of %d tokens", samples, seq_len)
    return torch.cat(written).cpu()


def _random_tokens(tokenizer: Any, samples: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens to begin with, `(samples, 1)`."""
    # An end of text or a reserved token begins none; those without a role are special among the added ones only.
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    device = generator.device
    known = torch.tensor([token for token in range(vocabulary) if token not in special], device=device)
    return known[torch.randint(len(known), (samples, 1), generator=generator, device=device)]


def _continued(
    model: LlamaForCausalLM, text: torch.Tensor, seq_len: int, vocabulary: int, generator: torch.Generator, progress: tqdm
) -> torch.Tensor:
    """`text` `(n, 1)` continued to `(n, seq_len)`, token by token. Not by `generate`: it mixes in the model's own settings."""
    token, cache = text, DynamicCache()
    cache.layer_class_to_replicate = partial(_BufferedLayer, seq_len)
    for _ in range(seq_len - 1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = _drawn(output.logits[:, -1, :vocabulary].float().softmax(-1), generator)
        text = torch.cat([text, token], 1)
        progress.update(len(token))
    return text


def _drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token `(n, 1)` for each row of `chances` `(n, vocabulary)`.

    On a CPU by the inverse of their sums, with one random number: multinomial draws one for every token of the vocabulary
    there, a fifth of the time of writing.
    """
    if chances.device.type != "cpu":  # whose running sums depend on the order that threads finish in
        return torch.multinomial(chances, 1, generator=generator)
    sums = chances.double().cumsum(-1)
    wanted = torch.rand(len(chances), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).clamp_max(chances.shape[1] - 1)
