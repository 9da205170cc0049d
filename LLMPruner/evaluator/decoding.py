"""Speed as a model is served on a GPU: decoding as one CUDA graph a token, and prompts that fill the card.

Called from Python a token's few hundred kernels take longer to launch than to run, and then a smaller model is no faster. Keys
and values in buffers of their final size make every step the same, so that it is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from LLMPruner.cost import Setup

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from LLMPruner.plan import PruningPlan

WARM_UP = 3  # steps before a capture, as torch's notes on CUDA graphs want it: libraries set themselves up
# A weight is then used thousands of times once read, where cards need a few hundred FLOPs a byte: more tokens are no faster.
FILL_TOKENS, FILL_LENGTH = 16384, 2048
DYNAMIC = ("dynamic", "longrope")  # rotations that look at the position on the host, which no graph can


def served(model: LlamaForCausalLM) -> bool:
    """Whether it is timed as it is served, too: on CUDA, where launching is what is measured otherwise."""
    return model.device.type == "cuda" and not any(kind in model.model.rotary_emb.rope_type for kind in DYNAMIC)


def on(device: torch.device) -> AbstractContextManager:
    """Make a CUDA device the current one, whose streams and graphs are meant then."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StaticDecoder:
    """Greedy decoding after a prompt `(batch, tokens)`, every step of the same shapes at the same addresses.

    transformers' static layers take the shape of the first keys that they see, which are each layer's own: a pruned one's
    buffers are as small as its KV heads are few, and a removed attention has none.
    """

    def __init__(self, model: LlamaForCausalLM, start: torch.Tensor, new_tokens: int) -> None:
        from transformers import StaticCache

        self.model, self.start = model, start.to(model.device)
        room = start.shape[1] + max(new_tokens, WARM_UP)
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.token = torch.zeros((len(start), 1), dtype=torch.long, device=model.device)
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        """Go back to the end of the prompt."""
        self.cache.reset()
        output = self.model(input_ids=self.start, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def step(self) -> None:
        """One token more, in the place of the one before. Nothing here waits for the device or depends on a value."""
        output = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(output.logits[:, -1:].argmax(-1))


def captured(decoder: StaticDecoder) -> Callable[[], None]:
    """`decoder.step` as a CUDA graph, on the current device; the decoder is back at the end of its prompt."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    decoder.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def decode_run(model: LlamaForCausalLM, start: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    """What decodes `new_tokens` greedy tokens after a prompt `(batch, tokens)` that is in the cache, to be timed once."""
    decoder = StaticDecoder(model, start, new_tokens)
    step = captured(decoder)

    def run() -> None:
        for _ in range(new_tokens):
            step()
        decoder.token.cpu()  # waits for the device

    return run


def prefill_shape(plans: Iterable[PruningPlan], itemsize: int, free: int) -> tuple[int, int]:
    """Prompts and their length that fill a card on which `free` bytes are left, the same for all models: half of it at most.

    A token takes a layer's activations, twice for what lies between them, and its keys and values in all layers.
    """
    plans = list(plans)
    length = min(FILL_LENGTH, *(plan.geometry.max_positions for plan in plans))
    token = max(
        2 * Setup(plan.geometry, itemsize).activations(1) + 2 * sum(plan.kv_counts) * plan.geometry.head_dim * itemsize
        for plan in plans
    )
    tokens = max(1, min(FILL_TOKENS, free // 2 // token))
    return max(1, tokens // length), min(length, tokens)
