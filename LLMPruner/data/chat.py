"""Chats as training text: rows become messages, and of their tokens the assistant's answers, with what ends them, are learned.

A model with a chat template reads chats by it. One without reads Stanford Alpaca's prompt (Taori et al. 2023, as in the column
`text` of its table), the answer, and the end of text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from LLMPruner.data.corpora import chat_rows
from LLMPruner.data.local import HALF, HALF_CHARACTER, JSON_KINDS
from LLMPruner.data.windows import bos_token
from LLMPruner.errors import UsageError, one_line

ROLES = ("system", "user", "assistant")
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TODAY = date(2024, 7, 26)  # for templates that ask: Llama 3.1's own default; a run resumed tomorrow must read the same text

Wrong = Callable[[str], UsageError]  # what to raise for a row: the sentence goes on after its file and line


@dataclass(frozen=True)
class Chat:
    """A chat's messages, and the prompt of its answer for a model without a chat template; None: it has no such form."""

    messages: tuple[dict[str, str], ...]
    prompt: str | None


def check_chats(name: str, data_dir: str | None, seq_len: int) -> None:
    """Raise UsageError unless the corpus has chats, of which those of about a window of `seq_len` tokens are understood."""
    size = 0
    for chat, _ in _chats(name, data_dir, seed=0):
        size += sum(len(message["content"].encode()) for message in chat.messages)
        if size >= seq_len:
            return
    if not size:
        raise UsageError(f"corpus {name} has no chat with an answer")


def encoded_chats(tokenizer: Any, name: str, data_dir: str | None, *, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """The chats of a corpus in random order as token ids, and which of them are learned. Raises UsageError."""
    for chat, wrong in _chats(name, data_dir, seed=seed):
        yield (_by_template if tokenizer.chat_template else _by_prompt)(tokenizer, chat, wrong)


def _chats(name: str, data_dir: str | None, *, seed: int) -> Iterator[tuple[Chat, Wrong]]:
    """The chats in random order, read one at a time, each with what to raise for it."""
    rows = chat_rows(name, data_dir)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for place in order:
        wrong = partial(rows.wrong, place)
        chat = chat_of(rows[place], wrong)
        if chat is not None:
            yield chat, wrong


def chat_of(row: Mapping[str, Any], wrong: Wrong) -> Chat | None:
    """The chat of a row with `messages`, or with `instruction`, `input` and `output`; None where it is null or answers nothing.

    Raises what `wrong` makes of a sentence where the row is not understood.
    """
    if "messages" in row:
        messages = row["messages"]
    elif {"instruction", "output"} <= row.keys():
        messages = _alpaca(row, wrong)
    else:
        raise wrong(f"has neither messages nor instruction and output: found {', '.join(row) or 'none'}")
    if messages is None:
        return None
    messages = _checked(messages, wrong)
    if not any(message["content"].strip() for message in messages if message["role"] == "assistant"):
        return None
    prompt = None
    if [message["role"] for message in messages] == ["user", "assistant"]:
        fields = row if "messages" not in row else {"instruction": messages[0]["content"]}
        prompt = (PROMPT_WITH_INPUT if fields.get("input") else PROMPT).format_map(fields)
    return Chat(messages, prompt)


def _alpaca(row: Mapping[str, Any], wrong: Wrong) -> list[dict[str, str]] | None:
    """The messages of an instruction: its input follows it, as a paragraph of its own."""
    parts = {name: row.get(name) for name in ("instruction", "input", "output")}
    if all(text is None for text in parts.values()):
        return None
    for name, text in parts.items():
        if not isinstance(text, str) and not (name == "input" and text is None):
            raise wrong(f"has {_kind(text)} as its {name}: write a string there")
    question = "\n\n".join(text for text in (parts["instruction"], parts["input"]) if text)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]


def _checked(messages: Any, wrong: Wrong) -> tuple[dict[str, str], ...]:
    """Messages of a role and a content each, and nothing else that would say how they are meant."""
    form = 'a list of {"role": ..., "content": ...}'
    if not isinstance(messages, list):
        raise wrong(f"has {_kind(messages)} as its messages: write {form}")
    for message in messages:
        if not isinstance(message, dict):
            raise wrong(f"has {_kind(message)} among its messages: write {form}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise wrong(f"has a message of the role {role!r}: write {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise wrong(f"has {_kind(content)} as the content of a message: write a string there")
        if HALF.search(content):
            raise wrong(HALF_CHARACTER)
        other = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
        if other:
            raise wrong(f"has a message with {other[0]}, and only role and content are understood: leave it out")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise wrong("has no answer of the assistant: write one after what it is asked")
    if messages[0]["role"] == "assistant":
        raise wrong("begins with the assistant: let the chat begin with what it is asked")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _kind(value: Any) -> str:
    return JSON_KINDS.get(type(value), "null" if value is None else type(value).__name__)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _by_prompt(tokenizer: Any, chat: Chat, wrong: Wrong) -> tuple[list[int], list[bool]]:
    """Prompt and answer, each tokenized for itself, as a model is asked; with BOS where the tokenizer adds it."""
    if chat.prompt is None:
        raise wrong("is more than a question and its answer, and this tokenizer has no chat template to put that into")
    if tokenizer.eos_token_id is None:
        raise UsageError("chats need a chat template or an EOS token, and this tokenizer has neither: use plain text")
    bos = bos_token(tokenizer, "auto")
    prompt = [bos] * (bos is not None) + _ids(tokenizer, chat.prompt)
    answer = [*_ids(tokenizer, chat.messages[-1]["content"]), tokenizer.eos_token_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _by_template(tokenizer: Any, chat: Chat, wrong: Wrong) -> tuple[list[int], list[bool]]:
    """The chat as the template renders it, and EOS where that is not how it ends.

    An answer is what follows the messages before it, rendered with the prompt for an answer. Both must be the same tokens once
    the chat goes on: what is learned is then what the model would be asked, and what it would have said.
    """
    messages = chat.messages
    whole = _rendered(tokenizer, messages, wrong)
    ids = _ids(tokenizer, whole)
    learned = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(tokenizer, messages[:index], wrong, prompt=True)
            after = whole if index == len(messages) - 1 else _rendered(tokenizer, messages[: index + 1], wrong)
            first, last = (_prefix(tokenizer, text, ids) for text in (before, after))
            if first is None or last is None or first >= last:
                raise wrong(
                    "is a chat that the tokenizer's chat template renders anew as it goes on, so that its answers are not "
                    "what the model would say: use chats of one answer each, or plain text"
                )
            learned[first:last] = [True] * (last - first)
    if tokenizer.eos_token_id is not None and not whole.rstrip().endswith(tokenizer.eos_token):
        ids.append(tokenizer.eos_token_id)
        learned.append(messages[-1]["role"] == "assistant")
    return ids, learned


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], wrong: Wrong, *, prompt: bool = False) -> str:
    options = {"add_generation_prompt": prompt, "strftime_now": TODAY.strftime}
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # a template raises what it likes
        raise wrong(f"is refused by the tokenizer's chat template: {one_line(error)}") from error


def _prefix(tokenizer: Any, text: str, ids: list[int]) -> int | None:
    """How many of the tokens `ids` are those of `text`; None where they do not begin with them."""
    begin = _ids(tokenizer, text)
    return len(begin) if ids[: len(begin)] == begin else None
