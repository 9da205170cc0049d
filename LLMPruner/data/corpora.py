"""Named corpora and local files as text; the train, validation and test splits are kept apart.

A corpus is looked for in `--data_dir` first (`<folder>/<split>.{txt,parquet,jsonl}`), then on the hub. A path to a local
file works as a corpus name too. Every corpus is a list of rows, of which those that are missing (null) count for nothing.
`--text_format` says how the others become one text; a PPL on one of the two says nothing about a PPL on the other:

- `clean`, the default: empty rows go, the others lose the line ends around them, and "\\n\\n" joins them.
- `raw`, the text that papers measure on (GPTQ, SparseGPT, Wanda: `"\\n\\n".join(test["text"])`): "\\n\\n" joins all rows as
  they come, with their line ends and with those that are empty. Of PTB papers join the sentences, which have no line ends,
  by single blanks (SparseGPT, GPTQ's ptb_new), and so does `raw`. c4 is a random part here, in either format: no paper's.

The rows of a .txt are its lines, as the hub makes WikiText's rows of the original files: a line that says something keeps
the "\\n" at its end, any other is the row "". So the original file, whose empty lines are " \\n", and the hub's table give the
same text in both formats. WikiText-2's test split has 4,358 rows, 1,467 of them empty: 1,296,370 bytes raw and 1,290,545
clean; the difference is 1,467 joints of two line ends and the 2,891 line ends of rows, 1% of SmolLM2's tokens. A copy that
left the empty rows out is the same `clean` and cannot be the papers' `raw`: `data.windows` warns of it.

Of a corpus of `documents`, too many to be read whole, a part in random order is read row by row.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from LLMPruner.data import local
from LLMPruner.data.local import SUFFIXES
from LLMPruner.errors import UsageError
from LLMPruner.files import existing_path

logger = logging.getLogger("LLMPruner")


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies: its folder below --data_dir, and its place on the hub (None: it has none)."""

    folder: str
    config: str | None = None
    hub: str | None = None
    column: str = "text"
    revision: str | None = None
    files: dict[str, str] | None = None  # by split
    halves: dict[str, int] | None = None  # splits that share a file: of its rows every second from this one on
    raw_joint: str = "\n\n"  # what papers put between two rows
    documents: bool = False  # rows are texts of their own, and too many to be read whole where a few windows are wanted
    chats: bool = False  # rows are chats (data/chat.py), of a train split alone: text for fine-tuning and nothing else


CORPORA = {
    "wikitext2": Corpus("wikitext-2-raw", config="wikitext-2-raw-v1", hub="Salesforce/wikitext"),
    "ptb": Corpus("ptb", hub="ptb-text-only/ptb_text_only", column="sentence", revision="refs/convert/parquet", raw_joint=" "),
    "c4": Corpus(
        "c4",
        hub="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        halves={"validation": 0, "test": 1},  # c4 has no test split
        documents=True,
    ),
    # Australian news articles that the PyPI package gensim carries: real text without a hub.
    "news": Corpus("news"),
    # 52 thousand instructions with answers of a larger model (Taori et al. 2023)
    "alpaca": Corpus("alpaca", hub="tatsu-lab/alpaca", chats=True),
}
TEXTS = tuple(sorted(name for name, corpus in CORPORA.items() if not corpus.chats))


def check_corpus(name: str, data_dir: str | None, split: str, seq_len: int = 1, text_format: str = "clean") -> None:
    """Raise UsageError when the corpus is unknown, cannot be read, or cannot hold a window of `seq_len` tokens.

    No tokenizer is needed: a token is at least one byte.
    """
    check_place(name, data_dir)
    size = 0
    if reads_a_part(name):
        texts: Iterable[str] = documents(name, split, data_dir, seed=0, text_format=text_format)
    else:
        texts = [load_text(name, split, data_dir, text_format)]
    for text in texts:
        size += len(text.encode())
        if size >= seq_len:
            break
    if size < seq_len:
        raise UsageError(f"corpus {name}, split {split}, has {size} bytes: shorter than one window of {seq_len}")


def check_place(name: str, data_dir: str | None, known: Iterable[str] = TEXTS) -> None:
    """Raise UsageError unless the corpus is a named one, or a local file of a kind that is read; `known` names are proposed."""
    if data_dir is not None and not existing_path(data_dir, "--data_dir").is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder")
    if name in CORPORA:
        return
    place = existing_path(name, "corpus")
    if not place.is_file():
        names, folder = ", ".join(known), " (a folder)" if name and place.is_dir() else ""
        raise UsageError(
            f"unknown corpus {name!r}{folder}: use one of {names}, or the path of a local {'/'.join(SUFFIXES)} file"
        )
    if place.suffix.lower() not in SUFFIXES:
        raise UsageError(f"corpus file {name} must end in {', '.join(SUFFIXES)}")


def describe(name: str) -> str:
    """The corpus name as tables print it: `wikitext2 (wikitext-2-raw-v1)`."""
    corpus = CORPORA.get(name)
    return f"{name} ({corpus.config})" if corpus is not None and corpus.config else name


@lru_cache(maxsize=8)
def load_text(name: str, split: str, data_dir: str | None = None, text_format: str = "clean") -> str:
    """The rows of one split as one text. Raises UsageError when the corpus cannot be read or lacks the split."""
    rows = (_formatted(row, name, text_format) for row in _rows(name, split, data_dir))
    texts = [text for text in rows if text is not None]
    if not any(text.strip() for text in texts):
        raise UsageError(f"corpus {name}, split {split}, is empty")
    return joint(name, text_format).join(texts)


def joint(name: str, text_format: str) -> str:
    """What stands between two rows of the corpus."""
    return CORPORA[name].raw_joint if text_format == "raw" and name in CORPORA else "\n\n"


def reads_a_part(name: str) -> bool:
    """Whether windows of the corpus are cut from a random part of its documents, because the whole is too large."""
    return name in CORPORA and CORPORA[name].documents


def documents(name: str, split: str, data_dir: str | None, *, seed: int, text_format: str = "clean") -> Iterator[str]:
    """The rows of one split in a random order, one at a time: the table itself stays on disk. Raises as `load_text`."""
    rows = _rows(name, split, data_dir)
    found = False
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for place in order:
        text = _formatted(rows[place], name, text_format)
        if text is not None:
            found = found or bool(text.strip())
            yield text
    if not found:
        raise UsageError(f"corpus {name}, split {split}, is empty")


def _formatted(row: str | None, name: str, text_format: str) -> str | None:
    """What a row adds to the text; None: nothing, not even a blank line."""
    if row is None:
        return None
    if text_format == "clean":
        return row.strip("\n") if row.strip() else None
    return row.strip() if joint(name, text_format) == " " else row  # the blanks around PTB's lines are not in the hub's rows


def holds_chats(name: str) -> bool:
    """Whether fine-tuning on the corpus learns the answers of its chats. Raises UsageError for a malformed file."""
    return CORPORA[name].chats if name in CORPORA else local.holds_chats(local.column_names(Path(name).expanduser()))


def chat_rows(name: str, data_dir: str | None) -> local.JsonLines | local.Table:
    """The rows of a corpus of chats as objects. Raises UsageError when they cannot be read."""
    file = local_file(name, data_dir, "train")
    return local.Table(_hub_table(name, "train"), f"corpus {name}") if file is None else local.read_chat_rows(file)


def is_local(name: str, split: str, data_dir: str | None) -> bool:
    """Whether the split of a named corpus lies below `data_dir`."""
    return local_file(name, data_dir, split) is not None


def _rows(name: str, split: str, data_dir: str | None) -> Sequence[str | None]:
    if name in CORPORA and CORPORA[name].chats:
        raise UsageError(f"corpus {name} holds chats, which are for fine-tuning alone: use one of {', '.join(TEXTS)} here")
    file = local_file(name, data_dir, split)
    if file is not None:
        return local.read_rows(file, CORPORA[name].column if name in CORPORA else "text")
    return _news_rows(split) if name == "news" else _hub_table(name, split)[CORPORA[name].column]


def local_file(name: str, data_dir: str | None, split: str) -> Path | None:
    """The file on this machine that the split is read from; None: there is none. Raises UsageError where it cannot be told."""
    if name not in CORPORA:
        return existing_path(name, "corpus")
    folder = None if data_dir is None else existing_path(os.fspath(Path(data_dir, CORPORA[name].folder)), "--data_dir")
    if folder is None or not folder.is_dir():
        return None
    try:
        files = [path for path in sorted(folder.iterdir()) if path.stem == split and path.is_file()]
    except OSError as error:
        raise UsageError(f"--data_dir {data_dir}: {folder} cannot be read: {error.strerror}") from error
    found = {path.suffix.lower(): path for path in files}  # of two that differ in capitals the one without
    return next((found[suffix] for suffix in SUFFIXES if suffix in found), None)


def _hub_table(name: str, split: str) -> Any:
    import datasets
    import huggingface_hub.constants

    if not _hub_answers():  # what is cached still loads, and at once
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    corpus = CORPORA[name]
    files = None if corpus.files is None else {split: corpus.files[split]}
    try:
        table = datasets.load_dataset(corpus.hub, corpus.config, data_files=files, split=split, revision=corpus.revision)
    except Exception as error:  # offline, renamed, gated: each raises its own kind, and the cure is the same
        logger.debug("hub error", exc_info=True)
        file = f"{split}.jsonl (one chat a line)" if corpus.chats else f"{split}.txt (one row a line)"
        raise UsageError(
            f"corpus {name} cannot be loaded from the hub ({type(error).__name__}): "
            f"put {corpus.folder}/{file} into a folder and pass --data_dir FOLDER"
        ) from error
    if corpus.halves is not None and split in corpus.halves:
        table = table.select(range(corpus.halves[split], len(table), 2))
    return table


@lru_cache(maxsize=1)
def _hub_answers() -> bool:
    """Whether the hub can be reached: asked once and briefly, for the libraries would retry for half a minute."""
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=3).close()
    except OSError:
        return any(name in os.environ for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))
    return True


def _gensim_data() -> Path | None:
    spec = importlib.util.find_spec("gensim")  # the package is not imported: only its data is read
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "test", "test_data")
    return folder if (folder / "lee_background.cor").is_file() else None


def _news_rows(split: str) -> list[str]:
    """Whole articles: the first 220 of Lee's background set are train, the next 30 validation, the rest and lee.cor test."""
    folder = _gensim_data()
    if folder is None:
        raise UsageError("corpus news comes with a package: pip install --no-deps gensim==4.4.0")
    # lee.cor has a pound sign in Latin-1; the rest of both files is ASCII
    background, extra = (
        (folder / name).read_text(encoding="latin-1").removesuffix("\n").split("\n")
        for name in ("lee_background.cor", "lee.cor")
    )
    return {"train": background[:220], "validation": background[220:250], "test": background[250:] + extra}[split]
