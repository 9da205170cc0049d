"""Token windows: cut, drawn, held out, and mixed with written text. Every window of a run comes from here, once; those of
fine-tuning by way of data/training.py.

Calibration reads the train split, the search's choices the validation split, and what is reported the test split.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from LLMPruner.config import CommonConfig, EvalConfig, PruneConfig
from LLMPruner.data.corpora import CORPORA, documents, joint, load_text, reads_a_part
from LLMPruner.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("LLMPruner")

IGNORED = -100  # where a window has no token, or one that is not to be learned: no loss is taken of it, as torch has it
HELD_OUT = 4  # every fourth calibration window is held out for the choices that a repair makes


@dataclass(frozen=True)
class PruneWindows:
    """The token windows `(n, seq_len)` of every stage of pruning, None where a stage needs none."""

    layers: torch.Tensor | None = None
    calibration: torch.Tensor | None = None
    repair: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    evaluation: dict[str, torch.Tensor] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of all tokens."""
        return fingerprint(*self.all())

    def all(self) -> list[torch.Tensor | None]:
        """Every stage's windows."""
        return [self.layers, self.calibration, self.repair, self.held_out, *self.evaluation.values()]


def fingerprint(*windows: torch.Tensor | None) -> str:
    """A hash of all tokens of windows `(n, seq_len)`."""
    digest = hashlib.sha256()
    for rows in windows:
        digest.update(b"-" if rows is None else repr(tuple(rows.shape)).encode() + rows.numpy().tobytes())
    return digest.hexdigest()[:32]


def prune_windows(
    tokenizer: Any,
    config: PruneConfig,
    common: CommonConfig,
    *,
    analyzes: bool,
    calibrates: bool,
    evaluation: EvalConfig | None = None,
) -> PruneWindows:
    """Cut the windows of one pruning run, before the weights are read: a bad corpus shows early.

    `analyzes` and `calibrates` say whether layers are scored and whether anything after that reads calibration text.
    """

    def calibration(seq_len: int, samples: int, split: str = "train") -> torch.Tensor:
        settings = {"data_dir": common.data_dir, "text_format": common.text_format, "seed": common.seed, "bos": bos}
        return load_windows(tokenizer, config.calibration_dataset, split, seq_len=seq_len, samples=samples, **settings)

    held_out, bos, tested = None, bos_token(tokenizer, config.calibration_bos), {}
    if config.pruning_strategy == "search":
        held_out = calibration(config.search_seq_len, config.search_windows[0], "validation")
    if evaluation is not None:
        tested = evaluation_windows(tokenizer, replace(evaluation, text_format=common.text_format), common.data_dir)
    return PruneWindows(
        layers=calibration(config.layer_importance_seq_len, config.layer_importance_samples) if analyzes else None,
        calibration=calibration(config.calibration_seq_len, config.channel_importance_samples) if calibrates else None,
        repair=calibration(config.calibration_seq_len, config.repair_windows) if calibrates else None,
        held_out=held_out,
        evaluation=tested,
    )


def bos_token(tokenizer: Any, wanted: str) -> int | None:
    """What every calibration window begins with: the BOS token, where the model is served with one. None: no such token.

    `wanted` is on, off, or auto: where the tokenizer adds one by itself. Raises UsageError where it knows none.
    """
    token = tokenizer.bos_token_id
    if wanted == "off" or (wanted == "auto" and (token is None or tokenizer("a").input_ids[:1] != [token])):
        return None
    if token is None:
        raise UsageError("--calibration_bos on needs a tokenizer with a BOS token, and this one has none: use auto or off")
    return token


def evaluation_windows(
    tokenizer: Any, config: EvalConfig, data_dir: str | None, split: str = "test"
) -> dict[str, torch.Tensor]:
    """Windows of every corpus of `config`, by name; cut once so that all models see the same ones."""
    settings = {"seq_len": config.seq_len, "samples": config.samples, "stride": config.stride}
    settings |= {"data_dir": data_dir, "text_format": config.text_format}
    return {name: load_windows(tokenizer, name, split, **settings) for name in config.datasets}


def read_alike(tokenizer: Any, other: Any, config: EvalConfig, data_dir: str | None, split: str = "test") -> bool:
    """Whether two tokenizers make the same windows of every corpus of `config`."""
    wanted = _tokens(config.samples, config.seq_len, config.stride)
    streams = (
        [stream(reader, name, split, wanted, data_dir, config.text_format) for name in config.datasets]
        for reader in (tokenizer, other)
    )
    return all(ours.equal(theirs) for ours, theirs in zip(*streams, strict=True))


@lru_cache(maxsize=8)
def token_ids(tokenizer: Any, name: str, split: str, data_dir: str | None = None, text_format: str = "clean") -> torch.Tensor:
    """The whole split as one stream of tokens, int64 `(n,)`; cached, because several stages cut windows from it."""
    import torch

    return torch.tensor(tokenizer(load_text(name, split, data_dir, text_format), verbose=False).input_ids)


@lru_cache(maxsize=8)
def _part_ids(
    tokenizer: Any, name: str, split: str, data_dir: str | None, text_format: str, wanted: int, seed: int
) -> torch.Tensor:
    """As many documents in random order as have `wanted` tokens, as one stream of tokens, int64 `(n,)`."""
    import torch

    ids: list[int] = []
    for place, document in enumerate(documents(name, split, data_dir, seed=seed, text_format=text_format)):
        text = joint(name, text_format) * bool(place) + document
        ids += tokenizer(text, verbose=False, add_special_tokens=not place).input_ids
        if len(ids) >= wanted:
            break
    return torch.tensor(ids)


def _tokens(samples: int, seq_len: int, stride: int | None) -> int:
    """Tokens of a text that `samples` windows are cut from."""
    return samples and (samples - 1) * (stride or seq_len) + seq_len


def stream(
    tokenizer: Any, name: str, split: str, wanted: int, data_dir: str | None, text_format: str, seed: int | None = None
) -> torch.Tensor:
    """The tokens that windows of a split are cut from, int64 `(n,)`: `wanted` ones (0: all) of a corpus read in part."""
    if wanted and reads_a_part(name):
        return _part_ids(tokenizer, name, split, data_dir, text_format, wanted, seed or 0)[:wanted]
    return token_ids(tokenizer, name, split, data_dir, text_format)


def load_windows(
    tokenizer: Any,
    name: str,
    split: str,
    *,
    seq_len: int,
    samples: int = 0,
    stride: int | None = None,
    data_dir: str | None = None,
    text_format: str = "clean",
    seed: int | None = None,
    bos: int | None = None,
) -> torch.Tensor:
    """Windows of `seq_len` tokens, int64 `(n, seq_len)`, in the order of the text; each begins with `bos`, where given.

    They lie side by side, or `stride` tokens from one to the next (not with `bos`). With a `stride` and all windows, the last
    one has what is left of the text, then IGNORED; side by side, and of some `samples`, the rest of the text is left out.

    `samples` windows are taken (0: all): spread evenly over the split, or drawn at random where `seed` is given. Raises
    UsageError when the split is shorter than one window. Of a corpus that is read in part they come from a random part of its
    documents, also where no `seed` is given.
    """
    import torch

    ids = stream(tokenizer, name, split, _tokens(samples, seq_len, stride), data_dir, text_format, seed)
    if bos is not None:
        ids, seq_len = ids[1:] if ids[0] == bos else ids, seq_len - 1
    windows = cut(ids, seq_len, name, split, stride, whole=stride is not None and not samples)
    count = len(windows)
    warn(name, split, data_dir, text_format)
    windows = drawn(windows, samples, seed)
    if samples > count:
        logger.warning(
            "corpus %s, split %s, has %d windows of %d, fewer than the %d asked for", name, split, count, seq_len, samples
        )
    if bos is not None:
        windows = torch.cat([torch.full((len(windows), 1), bos), windows], 1)
    logger.info("data: %s %s: %d of %d windows of %d tokens", name, split, len(windows), count, windows.shape[1])
    return windows


def cut(
    ids: torch.Tensor, seq_len: int, name: str, split: str, stride: int | None = None, *, whole: bool = False
) -> torch.Tensor:
    """A stream of tokens as windows, `(n, seq_len)`, each `stride` after the one before (None: `seq_len`).

    The `whole` stream: where tokens are left that one more window would predict, it ends with IGNORED for those that it lacks.
    Raises UsageError where there is not one window.
    """
    if len(ids) < seq_len:
        raise UsageError(f"corpus {name}, split {split}, has {len(ids)} tokens: shorter than one window of {seq_len}")
    stride = stride or seq_len
    left = (len(ids) - seq_len) % stride
    if whole and left > (1 if stride == seq_len else 0):  # the first token of a window is not predicted
        import torch

        ids = torch.cat([ids, ids.new_full((stride - left,), IGNORED)])
    return ids.unfold(0, seq_len, stride)


def warn(name: str, split: str, data_dir: str | None, text_format: str) -> None:
    """Say where a number that is measured on the text may not be what it looks like."""
    if name not in CORPORA and split != "train":
        logger.warning("corpus file %s has no splits: what is measured on it must not have been calibrated on it", name)
    if text_format == "raw" and name == "wikitext2" and "\n\n\n\n" not in load_text(name, split, data_dir, text_format):
        logger.warning(
            "corpus wikitext2, split %s, has no empty rows here, so --text_format raw is not the text that papers measure on",
            split,
        )


def drawn(windows: torch.Tensor, samples: int, seed: int | None) -> torch.Tensor:
    """`samples` of the windows (0: all), in their order: spread evenly, or drawn at random where `seed` is given."""
    import torch

    count = len(windows)
    if not 0 < samples < count:
        return windows
    if seed is None:
        return windows[torch.linspace(0, count - 1, samples, dtype=torch.float64).long()]  # the first and the last included
    return windows[shuffled(count, seed)[:samples].sort().values]


def shuffled(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in random order, int64 `(count,)`."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def held_out_tokens(windows: int, seq_len: int) -> torch.Tensor:
    """Which tokens of the calibration windows are not fitted but chosen by, bool `(windows, seq_len)`."""
    import torch

    held = torch.zeros(windows, seq_len, dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    if not held.any():  # fewer windows than HELD_OUT: the later part of each
        held[:, -max(1, seq_len // HELD_OUT) :] = True
    return held


def interleaved(windows: torch.Tensor, written: torch.Tensor, *, seed: int) -> torch.Tensor:
    """`windows` in random order and `written` between them, both spread evenly: any first part holds both alike."""
    import torch

    windows = windows[shuffled(len(windows), seed)]
    places = torch.cat([torch.arange(len(part)) / len(part) for part in (windows, written)])
    return torch.cat([windows, written])[places.argsort(stable=True)]


def mixed(windows: torch.Tensor, written: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Both in random order, so that the windows that a repair holds out are of both kinds."""
    import torch

    both = torch.cat([windows, written])
    return both[shuffled(len(both), seed)]
