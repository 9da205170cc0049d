"""Corpora: every local format gives the same windows; what cannot be read is one sentence that says what to do."""

from __future__ import annotations

import gzip
import importlib.util
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_text

from LLMPruner.data.corpora import check_corpus, describe, documents, joint, load_text, reads_a_part
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


def refusal(path) -> str:
    """The one sentence that a corpus file is refused with; it names the file."""
    with pytest.raises(UsageError) as caught:
        check_corpus(str(path), None, "test")
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def file_of(tmp_path, name: str, content: bytes | str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table_of(tmp_path, array, column: str = "text"):
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"number": list(range(len(array))), column: array}), path)
    return path


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('["a", "b"]', "a list"),
        ("[]", "a list"),
        ("3", "a number"),
        ("2.5", "a number"),
        ("NaN", "a number"),
        ("true", "true or false"),
        ('{"a": 1}', "an object"),
    ],
)
@pytest.mark.parametrize("before", ["", '{"text": "a"}\n', '\n{"text": null}\n'], ids=["first", "second", "third"])
def test_a_json_text_that_is_no_string_is_refused_with_its_line(tmp_path, before, text, kind):
    path = file_of(tmp_path, "x.jsonl", f'{before}{{"text": {text}}}\n{{"text": "b"}}\n')
    number = before.count("\n") + 1
    assert f"is not a readable .jsonl file: line {number} has {kind} as its text: write a string there" in refusal(path)


@pytest.mark.parametrize(
    ("row", "kind"),
    [("[1]", "a list"), ('"a"', "a string"), ("7", "a number"), ("null", "null"), ('[{"text": "a"}]', "a list")],
)
def test_a_json_row_that_is_no_object_is_refused_with_its_line(tmp_path, row, kind):
    path = file_of(tmp_path, "x.jsonl", f'{{"text": "a"}}\n{row}\n')
    assert f'line 2 is {kind}, not an object: write {{"text": "..."}} on each line' in refusal(path)
    assert f"line 1 is {kind}, not an object" in refusal(file_of(tmp_path, "x.jsonl", row))


@pytest.mark.parametrize(
    "row", ['{"text": "a"', "text", '{"text": "a"} {"text": "b"}', "{'text': 'a'}", "[" * 9**5, "9" * 5000]
)
def test_a_row_that_is_not_json_is_refused_with_its_line(tmp_path, row):
    assert "line 2 is not JSON (" in refusal(file_of(tmp_path, "x.jsonl", f'{{"text": "a"}}\n{row}\n'))


def test_a_json_file_or_row_without_a_text_is_refused_with_what_it_has(tmp_path):
    path = file_of(tmp_path, "x.jsonl", '{"label": 1, "Text": "a"}\n')
    assert "line 1, has no text column: found label, Text, want text" in refusal(path)
    assert "line 1, has no text column: found none" in refusal(file_of(tmp_path, "x.jsonl", "{}\n"))
    path = file_of(tmp_path, "x.jsonl", '{"text": "a"}\n{"sentence": "b"}\n')
    assert "line 2, has no text column: found sentence, want text" in refusal(path)


def test_what_looks_like_a_date_or_a_number_and_other_columns_of_any_kind_are_read(tmp_path):
    rows = [{"text": "2020-01-01", "x": 1}, {"text": "17", "x": [2]}, {"x": {"y": 3}, "text": "true"}]
    path = file_of(tmp_path, "x.jsonl", "\r\n\r\n".join(map(json.dumps, rows)))
    assert load_text(str(path), "test") == "2020-01-01\n\n17\n\ntrue"


def test_half_a_character_is_refused_and_a_whole_one_read(tmp_path):
    whole = file_of(tmp_path, "whole.jsonl", r'{"text": "\ud83d\ude00"}')
    assert load_text(str(whole), "test") == "\N{GRINNING FACE}"
    assert "line 2 holds half a character" in refusal(file_of(tmp_path, "x.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}'))


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([["a"], ["b"]]), "list<"),
        (pyarrow.array([{"a": "b"}]), "struct<"),
        (pyarrow.array([b"a", b"b"]), "binary"),
        (pyarrow.array([True]), "bool"),
        (pyarrow.array([0], pyarrow.timestamp("s")), "timestamp"),
        (pyarrow.array([1, 1]).dictionary_encode(), "int64"),
    ],
    ids=str,
)
def test_a_column_that_is_not_of_strings_is_refused_with_what_it_holds(tmp_path, array, kind):
    sentence = refusal(table_of(tmp_path, array))
    assert f"its column text holds {kind}" in sentence and sentence.endswith("write strings there")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), "dictionary"], ids=str)
def test_every_kind_of_strings_is_read_from_a_table(tmp_path, kind):
    array = (
        pyarrow.array(["a", None, "b"]).dictionary_encode() if kind == "dictionary" else pyarrow.array(["a", None, "b"], kind)
    )
    assert load_text(str(table_of(tmp_path, array)), "test") == "a\n\nb"


@pytest.mark.parametrize("array", [pyarrow.array([], pyarrow.string()), pyarrow.array([None, None]), pyarrow.array([" ", ""])])
def test_a_table_that_says_nothing_is_empty(tmp_path, array):
    assert refusal(table_of(tmp_path, array)).endswith("is empty")


def test_strings_of_a_table_that_are_not_utf8_are_refused(tmp_path):
    broken = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"))
    assert "is not a readable .parquet file: " in refusal(table_of(tmp_path, broken))


PLACES = ["x [v2]", "[abc]*", "what?", "{a,b}", "x ** y", "!x", ".hidden", "__private", "50% #1", "日本語"]


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl"])
@pytest.mark.parametrize("place", PLACES)
def test_a_folder_and_a_file_may_be_named_like_a_pattern(tmp_path, monkeypatch, place, suffix):
    write(tmp_path / place / "wikitext-2-raw", suffix, ["a", "b"])
    path = (tmp_path / place / "wikitext-2-raw" / f"test{suffix}").rename(tmp_path / place / f"{place}{suffix}")
    assert load_text(str(path), "test") == "a\n\nb"
    monkeypatch.chdir(path.parent)
    assert load_text(path.name, "test") == "a\n\nb"
    write(tmp_path / place / "ptb", suffix, ["c"])
    assert load_text("ptb", "test", str(tmp_path / place)) == "c"


def test_a_table_in_a_folder_that_datasets_takes_for_an_address_is_refused(tmp_path):
    write(tmp_path / "a::b", ".parquet", ["a"])
    assert "rename the file or its folder" in refusal(tmp_path / "a::b" / "test.parquet")


@pytest.mark.parametrize(("suffix", "capitals"), [(".txt", ".TXT"), (".parquet", ".Parquet"), (".jsonl", ".JSONL")])
def test_a_suffix_may_be_in_capitals(tmp_path, suffix, capitals):
    write(tmp_path / "ptb", suffix, ["a", "b"])
    path = (tmp_path / "ptb" / f"test{suffix}").rename(tmp_path / "ptb" / f"test{capitals}")
    check_corpus(str(path), None, "test")
    assert load_text(str(path), "test") == load_text("ptb", "test", str(tmp_path)) == "a\n\nb"
    write(tmp_path / "ptb", suffix, ["c"])
    assert load_text.__wrapped__("ptb", "test", str(tmp_path)) == "c", "of two the one that is spelled as the manual says"


def test_a_byte_order_mark_is_no_text(tmp_path):
    for text in ("\ufeffa\nb\n", "\ufeffa\n\ufeffb\n", "\ufeff\na\nb"):  # of a file, of two that were joined, alone on a line
        assert load_text.__wrapped__(str(file_of(tmp_path, "x.txt", text)), "test") == "a\n\nb"
    for rows in (
        '\ufeff{"text": "a"}\n{"text": "b"}\n',
        '{"text": "a"}\n\ufeff{"text": "b"}\n\ufeff\n',
        '\ufeff\n{"text": "a\\n\\nb"}',
    ):
        assert load_text.__wrapped__(str(file_of(tmp_path, "x.jsonl", rows)), "test") == "a\n\nb"
    assert refusal(file_of(tmp_path, "x.txt", "\ufeff")).endswith("is empty")
    assert refusal(file_of(tmp_path, "x.jsonl", "\ufeff")).endswith("is empty")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("suffix", "text"), [(".txt", "abc\ndef\n"), (".jsonl", '{"text": "abc"}\n')])
def test_wide_characters_are_refused(tmp_path, encoding, suffix, text):
    path = file_of(tmp_path, f"x{suffix}", text.encode(encoding))
    assert f"is not a readable {suffix} file: line 1 is UTF-16, or no text at all: save the file as UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("suffix", "text"), [(".txt", "good\ncaf\xe9\n"), (".jsonl", '{"text": "good"}\n{"text": "caf\xe9"}\n')]
)
def test_another_encoding_is_refused_with_its_line(tmp_path, suffix, text):
    path = file_of(tmp_path, f"x{suffix}", text.encode("latin-1"))
    assert "line 2 is not UTF-8 (invalid continuation byte): save the file as UTF-8" in refusal(path)
    assert f"is not a readable {suffix} file" in refusal(file_of(tmp_path, f"x{suffix}", gzip.compress(text.encode())))


def test_a_folder_is_refused_as_a_corpus(tmp_path):
    for name in ("x", "x.txt", "x [v2].jsonl", "x.parquet"):
        (tmp_path / name).mkdir()
        assert "(a folder): use one of c4, news, ptb, wikitext2, or the path of a local" in refusal(tmp_path / name)


def test_line_ends_of_all_systems_end_a_row(tmp_path):
    for text in ("a\r\n\r\nb\r\n", "a\rb\r", "a\nb\r\n"):
        path = str(file_of(tmp_path, "x.txt", text.encode()))
        assert load_text.__wrapped__(path, "test") == "a\n\nb"
    path = str(file_of(tmp_path, "x.txt", b"a\r\n \r\nb\r\n"))
    assert load_text.__wrapped__(path, "test", None, "raw") == "a\n\n\n\n\nb\n"
    path = str(file_of(tmp_path, "x.txt", "a\x0bb\x0cc\x85d\u2028e\n"))
    assert load_text.__wrapped__(path, "test") == "a\x0bb\x0cc\x85d\u2028e", "only line ends end a row"


def test_a_file_that_vanished_is_refused(tmp_path):
    for suffix in (".txt", ".jsonl", ".parquet"):
        with pytest.raises(UsageError, match=f"x{suffix} is not a readable {suffix} file: "):
            load_text(str(tmp_path / f"x{suffix}"), "test")


# What the hub's table of WikiText holds of an original file, whose empty lines are " \n"; both written down by hand.
ORIGINAL = " \n = A title = \n \n Some text . \n More text . \n \n \n = B = \n \n"
OF_THE_HUB = ["", " = A title = \n", "", " Some text . \n", " More text . \n", "", "", " = B = \n", ""]
RAW = "\n\n = A title = \n\n\n\n\n Some text . \n\n\n More text . \n\n\n\n\n\n\n = B = \n\n\n"
CLEAN = " = A title = \n\n Some text . \n\n More text . \n\n = B = "


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl"])
def test_raw_is_what_papers_join_and_clean_has_neither_line_ends_nor_empty_rows(tmp_path, suffix):
    assert "\n\n".join(OF_THE_HUB) == RAW
    folder = tmp_path / "wikitext-2-raw"
    write(folder, suffix, OF_THE_HUB)
    if suffix == ".txt":
        (folder / "test.txt").write_text(ORIGINAL)
    assert load_text("wikitext2", "test", str(tmp_path), "raw") == RAW
    assert load_text("wikitext2", "test", str(tmp_path), "clean") == load_text("wikitext2", "test", str(tmp_path)) == CLEAN
    assert load_text(str(folder / f"test{suffix}"), "test", None, "raw") == RAW


def test_raw_of_the_hub_is_its_rows_as_they_come(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": OF_THE_HUB})
    assert load_text.__wrapped__("wikitext2", "test", None, "raw") == RAW
    assert load_text.__wrapped__("wikitext2", "test") == CLEAN


def test_raw_drops_missing_rows_alone_and_a_last_line_without_an_end_has_none(tmp_path):
    write(tmp_path, ".jsonl", [None, "", " ", "a\n", None, "b"])
    assert load_text(str(tmp_path / "test.jsonl"), "test", None, "raw") == "\n\n \n\na\n\n\nb"
    assert load_text(str(file_of(tmp_path, "x.txt", "a\nb")), "test", None, "raw") == "a\n\n\nb"
    with pytest.raises(UsageError, match="is empty"):
        load_text(str(file_of(tmp_path, "empty.txt", "\n \n")), "test", None, "raw")


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl"])
def test_raw_joins_the_sentences_of_ptb_by_blanks(tmp_path, suffix):
    write(tmp_path / "ptb", suffix, [" no it was n't \n"[: -1 if suffix == ".txt" else None], "but N did"], "sentence")
    assert load_text("ptb", "test", str(tmp_path), "raw") == "no it was n't but N did"
    assert load_text("ptb", "test", str(tmp_path)) == " no it was n't \n\nbut N did"
    assert joint("ptb", "raw") == " " and joint("ptb", "clean") == joint("c4", "raw") == joint("x.txt", "raw") == "\n\n"


def test_documents_come_raw_too(tmp_path):
    write(tmp_path / "c4", ".jsonl", ["a\n", "", None, " "])
    assert sorted(documents("c4", "test", str(tmp_path), seed=0, text_format="raw")) == ["", " ", "a\n"]
    assert list(documents("c4", "test", str(tmp_path), seed=0)) == ["a"]


def test_the_size_of_a_corpus_is_that_of_its_format(tmp_path):
    path = str(file_of(tmp_path, "x.txt", "a\n\nb\n"))
    check_corpus(path, None, "test", 4)
    check_corpus(path, None, "test", 8, "raw")
    with pytest.raises(UsageError, match="has 4 bytes"):
        check_corpus(path, None, "test", 5)
    with pytest.raises(UsageError, match="has 8 bytes"):
        check_corpus(path, None, "test", 9, "raw")


def test_rows_of_json_lines_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "c4").mkdir()
    file_of(tmp_path / "c4", "test.jsonl", "\n".join(json.dumps({"text": str(index)}) for index in range(100)))
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    first = next(documents("c4", "test", str(tmp_path), seed=0))
    assert read == ['{"text": "0"}\n', f'{{"text": "{first}"}}\n'], "the first row says what the column is called"
