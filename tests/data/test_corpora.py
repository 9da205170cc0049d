"""Corpora: every local format gives the same windows; what cannot be read is one sentence that says what to do."""

from __future__ import annotations

import importlib.util
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_text

from LLMPruner.data.corpora import check_corpus, describe, documents, load_text, reads_a_part
from LLMPruner.data.windows import load_windows
from LLMPruner.errors import UsageError

ROWS = make_text(12, seed=7).split("\n")
WITH_EMPTY_ROWS = ["", *ROWS[:4], "   ", "", *ROWS[4:], "\n"]


def write(folder, suffix: str, rows, column: str = "text") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"test{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_every_local_format_gives_the_same_windows(tmp_path, tokenizer, column):
    results = []
    for suffix in (".txt", ".parquet", ".jsonl"):
        write(tmp_path / suffix / "wikitext-2-raw", suffix, WITH_EMPTY_ROWS, column)
        results.append(load_windows(tokenizer, "wikitext2", "test", seq_len=16, data_dir=str(tmp_path / suffix)))
        direct = str(tmp_path / suffix / "wikitext-2-raw" / f"test{suffix}")
        results.append(load_windows(tokenizer, direct, "test", seq_len=16))
    assert len(results[0]) > 5
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_rows_are_dropped_and_the_rest_joined_by_blank_lines(tmp_path):
    write(tmp_path / "ptb", ".txt", WITH_EMPTY_ROWS)
    assert load_text("ptb", "test", str(tmp_path)) == "\n\n".join(row for row in ROWS if row)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_missing_rows_count_as_empty(tmp_path, suffix):
    write(tmp_path / "ptb", suffix, [None, "a", None, "b"], "sentence")
    assert load_text("ptb", "test", str(tmp_path)) == "a\n\nb"


def test_splits_are_kept_apart(data_dir):
    texts = {split: load_text("wikitext2", split, str(data_dir)) for split in ("train", "validation", "test")}
    assert len(set(texts.values())) == 3


def test_a_corpus_shorter_than_a_window_is_refused(tmp_path, tokenizer):
    write(tmp_path / "ptb", ".txt", ["short"])
    with pytest.raises(UsageError, match="corpus ptb, split test, has [1-5] tokens: shorter than one window of 64"):
        load_windows(tokenizer, "ptb", "test", seq_len=64, data_dir=str(tmp_path))
    check_corpus("ptb", str(tmp_path), "test", 5)
    with pytest.raises(UsageError, match="has 5 bytes: shorter than one window of 6"):
        check_corpus("ptb", str(tmp_path), "test", 6)


def test_an_empty_corpus_is_refused(tmp_path):
    write(tmp_path / "ptb", ".txt", ["", "  "])
    with pytest.raises(UsageError, match="corpus ptb, split test, is empty"):
        load_text("ptb", "test", str(tmp_path))


@pytest.mark.parametrize("name", ["wikitext3", "", "no/such/file.txt", "."])
def test_an_unknown_corpus_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError, match="unknown corpus .*c4, news, ptb, wikitext2"):
        check_corpus(name, None, "test")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "corpus.csv").write_text("text\na\n")
    with pytest.raises(UsageError, match="must end in .txt, .parquet, .jsonl"):
        check_corpus(str(tmp_path / "corpus.csv"), None, "test")


def test_a_data_dir_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--data_dir .*nowhere is not a folder"):
        check_corpus("ptb", str(tmp_path / "nowhere"), "test")


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl"])
def test_an_unreadable_file_is_refused_by_name(tmp_path, suffix):
    (tmp_path / f"bad{suffix}").write_bytes(b"\xff\xfe{not text")
    with pytest.raises(UsageError, match=f"bad{suffix} is not a readable {suffix} file"):
        load_text(str(tmp_path / f"bad{suffix}"), "test")


def test_a_table_without_text_is_refused_with_its_columns(tmp_path):
    write(tmp_path, ".parquet", ["a"], column="label")
    with pytest.raises(UsageError, match="no text column: found label"):
        load_text(str(tmp_path / "test.parquet"), "test")


@pytest.mark.parametrize(("name", "folder"), [("wikitext2", "wikitext-2-raw"), ("ptb", "ptb"), ("c4", "c4")])
def test_a_hub_that_cannot_be_reached_names_the_way_around(monkeypatch, tmp_path, name, folder):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(UsageError, match=f"ConnectionError.*{folder}/test.txt .*--data_dir FOLDER"):
            check_corpus(name, data_dir, "test")


def test_the_hub_gives_the_same_text_as_a_local_copy(monkeypatch, tmp_path):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or {"text": ROWS})
    write(tmp_path / "wikitext-2-raw", ".txt", ROWS)
    assert load_text.__wrapped__("wikitext2", "test") == load_text("wikitext2", "test", str(tmp_path))
    assert asked[0][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1") and asked[0][1]["split"] == "test"


@pytest.mark.skipif(importlib.util.find_spec("gensim") is not None, reason="gensim is installed")
def test_news_says_which_package_carries_it():
    with pytest.raises(UsageError, match="pip install --no-deps gensim"):
        check_corpus("news", None, "test")


def test_a_corpus_is_described_with_its_configuration():
    assert describe("wikitext2") == "wikitext2 (wikitext-2-raw-v1)"
    assert describe("ptb") == "ptb" and describe("my/file.txt") == "my/file.txt"


def rows_of_the_hub(monkeypatch) -> list[tuple[tuple, dict]]:
    """A hub whose tables have ten numbered rows, one of them empty and one missing; what it is asked."""
    import datasets

    asked = []
    table = datasets.Dataset.from_dict({"text": ["0", "1", "", "3", None, "5", "6", "7", "8", "9"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table)
    return asked


def test_splits_that_share_a_file_have_no_row_in_common(monkeypatch):
    asked = rows_of_the_hub(monkeypatch)
    validation, test, train = (load_text.__wrapped__("c4", split).split("\n\n") for split in ("validation", "test", "train"))
    assert (validation, test) == (["0", "6", "8"], ["1", "3", "5", "7", "9"]) and len(train) == 8
    files = [list(options["data_files"].items()) for _, options in asked]
    assert files[0][0][1] == files[1][0][1] != files[2][0][1]
    assert [(name, options["split"]) for ((name, _),), (_, options) in zip(files, asked, strict=True)] == [
        (split, split) for split in ("validation", "test", "train")
    ]


def test_documents_are_all_rows_that_say_something_in_an_order_drawn_by_the_seed(monkeypatch):
    rows_of_the_hub(monkeypatch)
    one, same, other = (list(documents("c4", "train", None, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other and one != sorted(one)
    assert sorted(one) == sorted(other) == load_text.__wrapped__("c4", "train").split("\n\n")


def test_documents_are_read_one_at_a_time(monkeypatch):
    import datasets

    class Column(list):
        def __getitem__(self, place):
            read.append(place)
            return super().__getitem__(place)

    read = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": Column(map(str, range(1000)))})
    first = next(documents("c4", "train", None, seed=0))
    assert read == [int(first)]
    check_corpus("c4", None, "train", 5)
    assert len(read) < 10, "as many as hold a window"


def test_documents_of_an_empty_corpus_are_refused(tmp_path):
    write(tmp_path / "c4", ".txt", ["", "  "])
    with pytest.raises(UsageError, match="corpus c4, split test, is empty"):
        list(documents("c4", "test", str(tmp_path), seed=0))


def test_only_a_corpus_of_documents_is_read_in_part(tmp_path):
    assert reads_a_part("c4") and not any(reads_a_part(name) for name in ("wikitext2", "ptb", "news", str(tmp_path / "c4.txt")))
