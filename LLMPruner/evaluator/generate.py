"""What a model says: greedy text after a prompt, and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from LLMPruner.errors import UsageError, one_line
from LLMPruner.evaluator.columns import beside

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from LLMPruner.model.load import LoadedModel
    from LLMPruner.plan import Geometry

DISTINCT, REPEATED = (1, 2, 3), 4  # lengths of n-grams
WIDTH = 128  # of the texts side by side


@dataclass(frozen=True)
class Generation:
    """An answer, without the end of text that `ended` it, and the figures of its tokens.

    `distinct`: different n-grams over all n-grams, by n (Li et al. 2016); `repetition`: the share of 4-grams that occurred
    before in the answer (rep-4, Welleck et al. 2020). None where there are no such n-grams.
    """

    text: str
    tokens: int
    ended: bool
    distinct: dict[int, float | None]
    repetition: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"distinct": {str(size): share for size, share in self.distinct.items()}}


def generate(loaded: LoadedModel, prompt: str, *, new_tokens: int) -> Generation:
    """The model's greedy answer of at most `new_tokens` tokens; the prompt goes through the chat template where there is one.

    Raises UsageError for a prompt that is empty, does not fit the model or its template, and for weights that are on disk.
    """
    if loaded.streamed is not None:
        raise UsageError("--generate needs the weights in memory, every token would read them all: run it without --stream on")
    ids = fitting_ids(loaded.tokenizer, loaded.plan.geometry, prompt, new_tokens)
    stops = stop_tokens(loaded.model)
    answer = greedy(loaded.model, ids, new_tokens, stops=stops)[0, ids.shape[1] :].tolist()
    ended = answer[-1] in stops
    answer = answer[: len(answer) - ended]
    text = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    repetition = distinct(answer, REPEATED)
    return Generation(
        text,
        len(answer),
        ended,
        {size: distinct(answer, size) for size in DISTINCT},
        None if repetition is None else 1 - repetition,
    )


def fitting_ids(tokenizer: PreTrainedTokenizerBase, geometry: Geometry, prompt: str, new_tokens: int) -> torch.Tensor:
    """`prompt_ids`. Raises UsageError where the model does not embed them, or has no positions for them and the new ones."""
    ids = prompt_ids(tokenizer, prompt)
    if ids.max() >= geometry.vocab_size:
        raise UsageError(
            f"--generate: the tokenizer writes the prompt with token {int(ids.max())}, the model embeds {geometry.vocab_size}"
        )
    if ids.shape[1] + new_tokens > geometry.max_positions:
        raise UsageError(
            f"--generate: {ids.shape[1]} tokens of the prompt and {new_tokens} new ones are more than "
            f"{geometry.max_positions} positions"
        )
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Token ids `(1, tokens)` of what the model is asked."""
    if not prompt.strip():
        raise UsageError("--generate needs a prompt that says something")
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt).input_ids])
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise whatever it likes
        raise UsageError(f"the model's chat template does not take --generate's prompt: {one_line(error)}") from error
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


def stop_tokens(model: LlamaForCausalLM) -> frozenset[int]:
    """The tokens that end a text, as the model's generation settings say."""
    stop = model.generation_config.eos_token_id
    return frozenset(() if stop is None else (stop,) if isinstance(stop, int) else stop)


@torch.no_grad()
def greedy(
    model: LlamaForCausalLM, prompt: torch.Tensor, new_tokens: int, *, stops: Collection[int] = (), use_cache: bool = True
) -> torch.Tensor:
    """`prompt` `(1, tokens)` and at most `new_tokens` more, the likeliest each time, until one of `stops`.

    Not by `model.generate`: it mixes in the model's own penalties, which are to hide what is looked for here.
    """
    ids, cache = prompt.to(model.device), None
    fed = ids
    for _ in range(new_tokens):
        output = model(input_ids=fed, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        ids = torch.cat([ids, token], 1)
        if token.item() in stops:
            break
        fed = ids if cache is None else token
    return ids


def distinct(tokens: Sequence[int], size: int) -> float | None:
    """Different n-grams of `size` over all of them; None where there are none."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None


def side_by_side(names: Sequence[str], generations: Sequence[Generation], *, columns: int = WIDTH) -> str:
    """The answers in columns, one a model, their figures below."""
    rule = ["-" * columns]
    answers = beside([generation.text for generation in generations], columns)
    figures = beside(["\n".join(_figures(generation)) for generation in generations], columns)
    return "\n".join([*beside(names, columns), *rule, *answers, *rule, *figures])


def _figures(generation: Generation) -> list[str]:
    shares = [*((f"distinct-{size}", share) for size, share in generation.distinct.items())]
    shares.append((f"repeated {REPEATED}-grams", generation.repetition))
    told = [f"{name}: {'-' if share is None else f'{share:.3f}'}" for name, share in shares]
    return [f"{generation.tokens} tokens{'' if generation.ended else ', cut off'}", *told]
