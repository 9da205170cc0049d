"""Named corpora and local files as text; the train, validation and test splits are kept apart.

A corpus is looked for in `--data_dir` first (`<folder>/<split>.{txt,parquet,jsonl}`), then on the hub. A path to a local
file works as a corpus name too. Every corpus is a list of rows; empty rows are dropped and the rest is joined by blank
lines into one text, the usual perplexity text, so local copies and the hub give the same tokens. Of a corpus of `documents`,
too many to be read whole, a part in random order is read row by row.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from LLMPruner.errors import UsageError
from LLMPruner.files import existing_path

logger = logging.getLogger("LLMPruner")

SUFFIXES = (".txt", ".parquet", ".jsonl")


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
    documents: bool = False  # rows are texts of their own, and too many to be read whole where a few windows are wanted


CORPORA = {
    "wikitext2": Corpus("wikitext-2-raw", config="wikitext-2-raw-v1", hub="Salesforce/wikitext"),
    "ptb": Corpus("ptb", hub="ptb-text-only/ptb_text_only", column="sentence", revision="refs/convert/parquet"),
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
}


def check_corpus(name: str, data_dir: str | None, split: str, seq_len: int = 1) -> None:
    """Raise UsageError when the corpus is unknown, cannot be reached, or cannot hold a window of `seq_len` tokens.

    No tokenizer is needed: a token is at least one byte.
    """
    if data_dir is not None and not existing_path(data_dir, "--data_dir").is_dir():
        raise UsageError(f"--data_dir {data_dir} is not a folder")
    if name in CORPORA or existing_path(name, "corpus").is_file():
        if Path(name).suffix not in SUFFIXES and name not in CORPORA:
            raise UsageError(f"corpus file {name} must end in {', '.join(SUFFIXES)}")
        size = 0
        for document in documents(name, split, data_dir, seed=0) if reads_a_part(name) else [load_text(name, split, data_dir)]:
            size += len(document.encode())
            if size >= seq_len:
                break
        if size < seq_len:
            raise UsageError(f"corpus {name}, split {split}, has {size} bytes: shorter than one window of {seq_len}")
        return
    raise UsageError(
        f"unknown corpus {name!r}: use one of {', '.join(sorted(CORPORA))}, or the path of a local {'/'.join(SUFFIXES)} file"
    )


def describe(name: str) -> str:
    """The corpus name as tables print it: `wikitext2 (wikitext-2-raw-v1)`."""
    corpus = CORPORA.get(name)
    return f"{name} ({corpus.config})" if corpus is not None and corpus.config else name


@lru_cache(maxsize=8)
def load_text(name: str, split: str, data_dir: str | None = None) -> str:
    """The rows of one split joined by blank lines. Raises UsageError when the corpus cannot be reached or lacks the split."""
    rows = [_clean(row) for row in _rows(name, split, data_dir) if _says_something(row)]
    if not rows:
        raise UsageError(f"corpus {name}, split {split}, is empty")
    return "\n\n".join(rows)


def reads_a_part(name: str) -> bool:
    """Whether windows of the corpus are cut from a random part of its documents, because the whole is too large."""
    return name in CORPORA and CORPORA[name].documents


def documents(name: str, split: str, data_dir: str | None, *, seed: int) -> Iterator[str]:
    """The rows of one split in a random order, one at a time: the table itself stays on disk. Raises as `load_text`."""
    rows = _rows(name, split, data_dir)
    found = False
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for place in order:
        if _says_something(row := rows[place]):
            found = True
            yield _clean(row)
    if not found:
        raise UsageError(f"corpus {name}, split {split}, is empty")


def _clean(row: str) -> str:
    return row.strip("\n")


def _says_something(row: str | None) -> bool:
    return bool(row and row.strip())  # a table's missing rows are None


def _rows(name: str, split: str, data_dir: str | None) -> Sequence[str | None]:
    local = _local_file(name, data_dir, split)
    if local is not None:
        return _read_file(local, CORPORA[name].column if name in CORPORA else "text")
    return _news_rows(split) if name == "news" else _hub_rows(name, split)


def _local_file(name: str, data_dir: str | None, split: str) -> Path | None:
    if name not in CORPORA:
        return Path(name).expanduser()
    if data_dir is None:
        return None
    for suffix in SUFFIXES:
        path = Path(data_dir, CORPORA[name].folder, split + suffix)
        if path.is_file():
            return path
    return None


def _read_file(path: Path, column: str) -> Sequence[str | None]:
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not a readable .txt file: it is not UTF-8 ({error.reason})") from error
    import datasets

    kind = "parquet" if path.suffix == ".parquet" else "json"
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # datasets raises many kinds for a malformed file
        raise UsageError(f"{path} is not a readable {path.suffix} file: {str(error).splitlines()[0]}") from error
    for candidate in (column, "text", "sentence"):
        if candidate in table.column_names:
            return table[candidate]
    raise UsageError(f"{path} has no text column: found {', '.join(table.column_names)}, want {column}")


def _hub_rows(name: str, split: str) -> Sequence[str | None]:
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
        raise UsageError(
            f"corpus {name} cannot be loaded from the hub ({type(error).__name__}): "
            f"put {corpus.folder}/{split}.txt (one row a line) into a folder and pass --data_dir FOLDER"
        ) from error
    if corpus.halves is not None and split in corpus.halves:
        table = table.select(range(corpus.halves[split], len(table), 2))
    return table[corpus.column]


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
        (folder / name).read_text(encoding="latin-1").split("\n") for name in ("lee_background.cor", "lee.cor")
    )
    return {"train": background[:220], "validation": background[220:250], "test": background[250:] + extra}[split]
