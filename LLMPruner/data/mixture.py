"""What fine-tuning is asked to read: parts with weights, and how many windows each gives; no torch.

An entry of `--dataset` is a corpus, a path, or `self` (text that the dense model writes), with `:weight` behind it or not.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from LLMPruner.config import CommonConfig
from LLMPruner.data.chat import check_chats
from LLMPruner.data.corpora import CORPORA, check_corpus, check_place, holds_chats
from LLMPruner.errors import UsageError
from LLMPruner.files import existing_path
from LLMPruner.training_config import FinetuneConfig

SELF = "self"


@dataclass(frozen=True)
class Part:
    """One text of a mixture and its share of the whole, in (0, 1]."""

    name: str
    weight: float


def mixture(config: FinetuneConfig) -> tuple[Part, ...]:
    """The parts of `config.dataset`; their weights add up to 1. Raises UsageError."""
    flag = f"{config.prefix}dataset"
    entries = [_entry(entry, flag) for entry in config.dataset]
    places = [existing_path(name, flag).resolve() for name, _ in entries]
    if not entries:
        raise UsageError(f"{flag} needs at least one corpus")
    for place, (name, _) in zip(places, entries, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{flag} names {name} twice: name it once, with the weight of both")
    largest = max(weight for _, weight in entries)  # divided by first, so that no sum leaves the range of floats
    total = sum(weight / largest for _, weight in entries)
    return tuple(Part(name, weight / largest / total) for name, weight in entries)


def _entry(entry: str, flag: str) -> tuple[str, float]:
    """A name or a path, and its weight: what is behind the last colon, unless a file is called so."""
    if ":" not in entry or existing_path(entry, flag).exists():
        return entry, 1.0
    name, _, text = entry.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"{flag} {entry}: there is no such file, and {text!r} is no weight, which is a positive number")
    return name, weight


def windows_of(parts: tuple[Part, ...], config: FinetuneConfig) -> tuple[int, ...]:
    """How many of the windows each part gives, by largest remainder; at least one. Raises UsageError."""
    quotas = [part.weight * config.samples for part in parts]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: config.samples - sum(counts)]:
        counts[index] += 1
    for part, count in zip(parts, counts, strict=True):
        if count < 1:
            flag = f"{config.prefix}samples {config.samples}"
            raise UsageError(f"{flag} leaves {part.name} no window at its weight: ask for more, or for a larger weight")
    return tuple(counts)


def windows_by_part(config: FinetuneConfig) -> dict[str, int]:
    """How many of the windows each part of the mixture gives, by its name. Raises UsageError."""
    parts = mixture(config)
    return dict(zip((part.name for part in parts), windows_of(parts, config), strict=True))


def as_typed(config: FinetuneConfig) -> str:
    """The entries as the user would type them."""
    return shlex.join(config.dataset)


def check_mixture(config: FinetuneConfig, common: CommonConfig) -> None:
    """All checks of the training text that need no tokenizer. Raises UsageError."""
    parts = mixture(config)
    windows_of(parts, config)
    for name in (part.name for part in parts if part.name != SELF):
        check_place(name, common.data_dir, known=sorted([*CORPORA, SELF]))
        if holds_chats(name):
            check_chats(name, common.data_dir, config.seq_len)
        else:
            check_corpus(name, common.data_dir, "train", config.seq_len, common.text_format)
