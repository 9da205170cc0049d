"""The text of fine-tuning: windows of every part of the mixture, which of their tokens are learned, and others to validate on.

What is trained on comes of train splits, of local files, and of the dense model; nothing comes of a test split. Chats are
strung together as documents are, so that no window is padded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from LLMPruner.config import CommonConfig
from LLMPruner.data.chat import encoded_chats
from LLMPruner.data.corpora import CORPORA, holds_chats, is_local, reads_a_part
from LLMPruner.data.mixture import SELF, mixture, windows_by_part
from LLMPruner.data.windows import cut, drawn, fingerprint, shuffled, stream, warn
from LLMPruner.errors import UsageError
from LLMPruner.training_config import FinetuneConfig

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("LLMPruner")

# Of each part to validate on. Two states of a model are compared on the same tokens, 8 thousand at 512 a window: enough to tell
# them apart by a hundredth of a nat, in the time of 16 training steps without a way back.
HELD_OUT_WINDOWS = 16
SCARCE = 20  # one window of so many is held out where none would be left


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Windows of tokens, int64 `(n, seq_len)`, and which are learned, bool alike: never the first, which has no past."""

    windows: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def plain(cls, windows: torch.Tensor) -> TrainingRows:
        """Windows of which every token is learned."""
        import torch

        return cls(windows, (torch.arange(windows.shape[1]) > 0).expand_as(windows).contiguous())

    @classmethod
    def joined(cls, rows: Sequence[TrainingRows]) -> TrainingRows:
        """All rows, one after the other."""
        import torch

        return cls(torch.cat([part.windows for part in rows]), torch.cat([part.targets for part in rows]))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> TrainingRows:
        return TrainingRows(self.windows[index], self.targets[index])


@dataclass(frozen=True, eq=False)
class TrainingText:
    """What a fine-tuning reads: rows in their order, of which part each is, int64 `(n,)`, by the order of `weights`.

    `weights` are those of the mixture by part, adding up to 1; `held_out` the rows to validate on, of the parts that have any.
    """

    rows: TrainingRows
    parts: torch.Tensor
    weights: dict[str, float]
    held_out: dict[str, TrainingRows]

    def all(self) -> list[torch.Tensor]:
        """All windows: those to train on, and those held out in the order of their parts."""
        return [self.rows.windows, *(rows.windows for rows in self.held_out.values())]

    def fingerprint(self) -> str:
        """A hash of all tokens and of what is learned of them."""
        rows = [self.rows, *self.held_out.values()]
        return fingerprint(self.parts, *(tensor for part in rows for tensor in (part.windows, part.targets)))


def training_text(
    tokenizer: Any, config: FinetuneConfig, common: CommonConfig, write: Callable[[int], torch.Tensor] | None = None
) -> TrainingText:
    """The training text of `config.dataset`; that of one corpus in its order, that of several in an order of the seed.

    `write(count)` gives windows `(count, seq_len)` that the dense model writes; it is called once, after all else was read, and
    only where `self` is asked for. Raises UsageError where it is then None, and where a corpus is too short or not understood.
    """
    import torch

    parts = mixture(config)
    if write is None and SELF in (part.name for part in parts):
        raise UsageError(f"{config.prefix}dataset {SELF} is text that the dense model writes, and there is none here")
    counts = windows_by_part(config)
    found = {}
    for name in sorted(counts, key=lambda name: name == SELF):
        if name == SELF:
            found[name] = _written(write, counts[name])
        elif holds_chats(name):
            found[name] = _of_chats(tokenizer, name, counts[name], config, common)
        else:
            found[name] = _of_text(tokenizer, name, counts[name], config, common)
    train = [found[name][0] for name in counts]
    rows = TrainingRows.joined(train)
    which = torch.arange(len(train)).repeat_interleave(torch.tensor([len(part) for part in train]))
    if len(train) > 1:
        order = shuffled(len(rows), common.seed)
        rows, which = rows[order], which[order]
    held_out = {name: found[name][1] for name in counts if len(found[name][1])}
    return TrainingText(rows, which, {part.name: part.weight for part in parts}, held_out)


def _written(write: Callable[[int], torch.Tensor], asked: int) -> tuple[TrainingRows, TrainingRows]:
    """Rows that the dense model writes, to train on and to validate on."""
    rows = TrainingRows.plain(write(asked + HELD_OUT_WINDOWS))
    return rows[:asked], rows[asked:]


def _of_text(
    tokenizer: Any, name: str, asked: int, config: FinetuneConfig, common: CommonConfig
) -> tuple[TrainingRows, TrainingRows]:
    """Rows of a corpus of plain text: those of `load_windows`, and others of its validation split or, without one, of train."""
    import torch

    held = _validation(tokenizer, name, config.seq_len, common)
    spare = 0 if held is not None else HELD_OUT_WINDOWS
    settings = (common.data_dir, common.text_format)
    ids = stream(tokenizer, name, "train", config.seq_len * (asked + spare), *settings, common.seed)
    windows = cut(ids, config.seq_len, name, "train")
    warn(name, "train", *settings)
    order = torch.arange(len(windows)) if reads_a_part(name) else shuffled(len(windows), common.seed)
    if held is not None:
        train = order[:asked].sort().values
        _report(name, len(train), len(windows), asked, len(held), config.seq_len, "its validation split")
        return TrainingRows.plain(windows[train]), TrainingRows.plain(held)
    return _divided(TrainingRows.plain(windows), order, name, asked)


def _validation(tokenizer: Any, name: str, seq_len: int, common: CommonConfig) -> torch.Tensor | None:
    """Windows spread over the validation split; None where the corpus has none, or has it elsewhere than its train split."""
    if name not in CORPORA:
        return None
    trains, here = (is_local(name, split, common.data_dir) for split in ("train", "validation"))
    if trains and not here:  # what lies in a folder may be other text than the hub's
        return None
    try:
        ids = stream(tokenizer, name, "validation", seq_len * HELD_OUT_WINDOWS, common.data_dir, common.text_format)
    except UsageError:
        if here:  # and malformed
            raise
        return None
    return None if len(ids) < seq_len else drawn(cut(ids, seq_len, name, "validation"), HELD_OUT_WINDOWS, None)


def _of_chats(
    tokenizer: Any, name: str, asked: int, config: FinetuneConfig, common: CommonConfig
) -> tuple[TrainingRows, TrainingRows]:
    """Rows of as many chats, in random order, as are needed."""
    import torch

    chats = encoded_chats(tokenizer, name, common.data_dir, seed=common.seed)
    rows = packed(chats, config.seq_len, asked + HELD_OUT_WINDOWS, name)
    return _divided(rows, torch.arange(len(rows)), name, asked)


def packed(chats: Iterable[tuple[list[int], list[bool]]], seq_len: int, wanted: int, name: str) -> TrainingRows:
    """Up to `wanted` windows of chats strung together, without those of which nothing is learned.

    Raises UsageError where there is none.
    """
    import torch

    ids: list[int] = []
    learned: list[bool] = []
    windows, targets, read = [], [], 0
    for more, answers in chats:
        ids, learned, read = ids + more, learned + answers, read + len(more)
        starts = range(0, len(ids) - seq_len + 1, seq_len)
        for start in starts:
            mask = [False, *learned[start + 1 : start + seq_len]]
            if any(mask):
                windows.append(ids[start : start + seq_len])
                targets.append(mask)
        done = len(starts) * seq_len
        ids, learned = ids[done:], learned[done:]
        if len(windows) >= wanted:
            break
    if not windows:
        raise UsageError(
            f"corpus {name} has chats of {read} tokens, and of them no window of {seq_len} with an answer to learn"
        )
    return TrainingRows(torch.tensor(windows[:wanted]), torch.tensor(targets[:wanted]))


def _divided(rows: TrainingRows, order: torch.Tensor, name: str, asked: int) -> tuple[TrainingRows, TrainingRows]:
    """Of rows in this order those to train on, as many as are asked for, and some of the others.

    Where there are no others, a few of a corpus that never has a validation split are held out instead of trained on.
    """
    count, (_, seq_len) = len(rows), rows.windows.shape
    kept = min(HELD_OUT_WINDOWS, count // SCARCE) if name not in CORPORA or CORPORA[name].chats else 0
    train = asked if count > asked else count - kept
    first, others = order[:train].sort().values, order[train : train + HELD_OUT_WINDOWS].sort().values
    _report(name, train, count, asked, len(others), seq_len, "train")
    return rows[first], rows[others]


def _report(name: str, train: int, count: int, asked: int, held: int, seq_len: int, source: str) -> None:
    """Say how many windows are trained on and how many held out, and where there are fewer than wanted."""
    if train < asked:
        logger.warning("corpus %s has %d windows of %d to train on, fewer than the %d asked for", name, train, seq_len, asked)
    if not held:
        logger.warning("corpus %s has no window left to validate on: none of it is held out", name)
    logger.info("data: %s train: %d of %d windows of %d tokens; %d of %s held out", name, train, count, seq_len, held, source)
