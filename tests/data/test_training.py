"""The text of fine-tuning: of one corpus the windows as ever, of several a mixture; others to validate on; no test split."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, make_text, random_windows

from LLMPruner.config import CommonConfig
from LLMPruner.data.chat import encoded_chats
from LLMPruner.data.corpora import load_text
from LLMPruner.data.training import HELD_OUT_WINDOWS, TrainingRows, TrainingText, packed, training_text
from LLMPruner.data.windows import load_windows
from LLMPruner.errors import UsageError
from LLMPruner.training_config import FinetuneConfig

SEQ_LEN = 16
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


class Characters:
    """A tokenizer of one token a character, so that windows can be told from the text."""

    bos_token_id, chat_template = None, None

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(char) for char in text]})


def words(rows: TrainingRows | torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in (rows.windows if isinstance(rows, TrainingRows) else rows).tolist()]


def text_of(
    tokenizer, *entries, samples=20, seq_len=SEQ_LEN, folder=None, seed=3, write=None, text_format="clean"
) -> TrainingText:
    common = CommonConfig(seed=seed, data_dir=None if folder is None else str(folder), text_format=text_format)
    return training_text(tokenizer, FinetuneConfig(dataset=entries, samples=samples, seq_len=seq_len), common, write)


def write(folder, corpus: str, split: str, *rows: str) -> None:
    (folder / corpus).mkdir(exist_ok=True)
    (folder / corpus / f"{split}.txt").write_text("\n".join(rows))


def numbered(count: int, first: int = 0x4E00) -> str:
    """A text of so many windows of two tokens, all different."""
    return "".join(chr(first + index) for index in range(2 * count))


def chats_of(tmp_path, count: int, name: str = "chats.jsonl") -> str:
    rows = [
        {"instruction": f"Say {index}.", "output": sentence} for index, sentence in enumerate(make_text(count, 5).splitlines())
    ]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


@pytest.fixture
def chatting(tokenizer):
    """The tiny tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def c4(tmp_path):
    """A --data_dir with a corpus of documents, with and without its validation split."""
    for split, first in (("train", 0x4E00), ("validation", 0x3400), ("test", 0xAC00)):
        write(tmp_path, "c4", split, *(chr(first + index) * 6 for index in range(200)))
    return tmp_path


@pytest.mark.parametrize("samples", [1, 37, 10**5])
@pytest.mark.parametrize("text_format", ["clean", "raw"])
@pytest.mark.parametrize("seed", [0, 42])
def test_one_corpus_gives_the_windows_that_it_always_gave(data_dir, tokenizer, samples, seed, text_format):
    place = {"data_dir": str(data_dir), "seed": seed, "text_format": text_format}
    expected = load_windows(tokenizer, "wikitext2", "train", seq_len=SEQ_LEN, samples=samples, **place)
    text = text_of(tokenizer, "wikitext2", samples=samples, folder=data_dir, seed=seed, text_format=text_format)
    assert text.rows.windows.equal(expected) and text.rows.windows.dtype == torch.int64
    assert text.weights == {"wikitext2": 1.0} and text.parts.equal(torch.zeros(len(expected), dtype=torch.int64))


@pytest.mark.parametrize("validates", [True, False])
def test_a_corpus_read_in_part_and_a_file_give_the_windows_that_they_always_gave(c4, validates):
    if not validates:
        (c4 / "c4" / "validation.txt").unlink()
    options = {"seq_len": 4, "samples": 9, "seed": 3}
    text = text_of(Characters(), "c4", samples=9, seq_len=4, folder=c4)
    assert text.rows.windows.equal(load_windows(Characters(), "c4", "train", data_dir=str(c4), **options))
    name = str(c4 / "c4" / "train.txt")
    text = text_of(Characters(), name, samples=9, seq_len=4)
    assert text.rows.windows.equal(load_windows(Characters(), name, "train", **options))


def test_of_plain_text_all_is_learned_but_what_has_no_past(data_dir, tokenizer):
    text = text_of(tokenizer, "wikitext2", folder=data_dir)
    for rows in (text.rows, text.held_out["wikitext2"]):
        assert rows.targets.dtype == torch.bool and rows.targets.shape == rows.windows.shape
        assert rows.targets[:, 1:].all() and not rows.targets[:, 0].any()


def test_a_mixture_holds_of_each_part_its_share_in_an_order_of_the_seed(data_dir, tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(make_text(100, seed=8))
    text = text_of(tokenizer, "wikitext2:3", str(path), folder=data_dir, samples=40)
    assert text.weights == {"wikitext2": 0.75, str(path): 0.25} and len(text.rows) == 40
    for index, (name, count) in enumerate((("wikitext2", 30), (str(path), 10))):
        alone = load_windows(tokenizer, name, "train", seq_len=SEQ_LEN, samples=count, data_dir=str(data_dir), seed=3)
        assert sorted(text.rows.windows[text.parts == index].tolist()) == sorted(alone.tolist())
    order = text.parts.tolist()
    assert order not in (sorted(order), sorted(order, reverse=True))
    same, other = (text_of(tokenizer, "wikitext2:3", str(path), folder=data_dir, samples=40, seed=seed) for seed in (3, 4))
    assert same.rows.windows.equal(text.rows.windows) and same.parts.tolist() == order != other.parts.tolist()
    assert text.held_out.keys() == {"wikitext2", str(path)}


@pytest.fixture
def letters(tmp_path):
    """Splits that no letter is in twice: 50 windows of two tokens, and 30 each of validation and test."""
    for split, count, first in (("train", 50, 0x4E00), ("validation", 30, 0x3400), ("test", 30, 0xAC00)):
        write(tmp_path, "wikitext-2-raw", split, numbered(count, first))
    return tmp_path


def test_a_corpus_is_validated_on_its_validation_split_spread_evenly(letters):
    text = text_of(Characters(), "wikitext2", seq_len=2, samples=50, folder=letters)
    held = load_windows(Characters(), "wikitext2", "validation", seq_len=2, samples=HELD_OUT_WINDOWS, data_dir=str(letters))
    assert text.held_out["wikitext2"].windows.equal(held) and len(text.rows) == 50
    assert {ord(row[0]) // 0x1000 for row in words(text.rows) + words(text.held_out["wikitext2"])} == {0x4, 0x3}


def test_a_corpus_whose_validation_split_is_not_beside_it_is_validated_on_what_is_not_trained_on(letters, monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: pytest.fail("what lies here may be other text than the hub's")
    )
    (letters / "wikitext-2-raw" / "validation.txt").unlink()
    for samples, held in ((20, 16), (40, 10)):
        text = text_of(Characters(), "wikitext2", seq_len=2, samples=samples, folder=letters)
        expected = load_windows(Characters(), "wikitext2", "train", seq_len=2, samples=samples, data_dir=str(letters), seed=3)
        others = words(text.held_out["wikitext2"])
        assert text.rows.windows.equal(expected) and len(others) == len(set(others)) == held
        assert not set(others) & set(words(expected)) and all(0x4E00 <= ord(char) < 0x5000 for row in others for char in row)


def test_where_all_of_a_corpus_is_trained_on_nothing_is_held_out_and_that_is_said(letters, caplog):
    (letters / "wikitext-2-raw" / "validation.txt").unlink()
    caplog.set_level(logging.WARNING, "LLMPruner")
    text = text_of(Characters(), "wikitext2", seq_len=2, samples=50, folder=letters)
    assert len(text.rows) == 50 and text.held_out == {}
    assert [record.message for record in caplog.records] == [
        "corpus wikitext2 has no window left to validate on: none of it is held out"
    ]


def test_documents_without_a_validation_split_are_validated_on_others(c4):
    (c4 / "c4" / "validation.txt").unlink()
    text = text_of(Characters(), "c4", seq_len=4, samples=30, folder=c4)
    assert len(text.held_out["c4"]) == 16 and not set(words(text.rows)) & set(words(text.held_out["c4"]))


def test_a_validation_split_shorter_than_a_window_is_as_none(letters):
    write(letters, "wikitext-2-raw", "validation", "a")
    text = text_of(Characters(), "wikitext2", seq_len=2, samples=20, folder=letters)
    assert all(row[0] >= chr(0x4E00) for row in words(text.held_out["wikitext2"]))


def test_a_malformed_validation_split_is_refused(letters):
    (letters / "wikitext-2-raw" / "validation.txt").write_bytes(b"\xff\xfe{")
    with pytest.raises(UsageError, match="validation.txt is not a readable .txt file"):
        text_of(Characters(), "wikitext2", seq_len=2, folder=letters)


@pytest.fixture
def uncached():
    """Nothing of the hub is remembered from another test, or for one."""
    load_text.cache_clear()
    yield
    load_text.cache_clear()


def test_a_hub_without_the_validation_split_is_as_a_folder_without(monkeypatch, uncached):
    import datasets

    def hub(*_, split, **__):
        if split != "train":
            raise ConnectionError("not in the cache")
        return {"text": [numbered(50)]}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr("LLMPruner.data.corpora._hub_answers", lambda: True)
    text = text_of(Characters(), "wikitext2", seq_len=2, samples=20)
    assert len(text.held_out["wikitext2"]) == 16


@pytest.mark.parametrize(
    ("count", "samples", "trained", "held"),
    [
        (100, 20, 20, 16),
        (100, 90, 90, 10),
        (100, 99, 99, 1),
        (100, 100, 95, 5),
        (100, 500, 95, 5),
        (20, 20, 19, 1),
        (900, 900, 884, 16),
    ],
)
def test_of_a_file_that_is_all_asked_for_a_twentieth_is_held_out(tmp_path, caplog, count, samples, trained, held):
    caplog.set_level(logging.WARNING, "LLMPruner")
    (tmp_path / "own.txt").write_text(numbered(count))
    name = str(tmp_path / "own.txt")
    text = text_of(Characters(), name, seq_len=2, samples=samples)
    assert (len(text.rows), len(text.held_out[name])) == (trained, held)
    assert not set(words(text.rows)) & set(words(text.held_out[name]))
    fewer = f"has {trained} windows of 2 to train on, fewer than the {samples} asked for" in caplog.text
    assert fewer == (trained < samples) and "left to validate on" not in caplog.text


def test_of_a_file_of_fewer_than_twenty_windows_none_is_held_out(tmp_path, caplog):
    (tmp_path / "own.txt").write_text(numbered(19))
    text = text_of(Characters(), str(tmp_path / "own.txt"), seq_len=2, samples=19)
    assert len(text.rows) == 19 and text.held_out == {} and "no window left to validate on" in caplog.text
    assert len(text_of(Characters(), str(tmp_path / "own.txt"), seq_len=2, samples=18).held_out) == 1


def test_nothing_of_a_test_split_is_read(monkeypatch, uncached):
    read = []
    rows = ["abcdefgh" * 40]
    monkeypatch.setattr("LLMPruner.data.corpora._rows", lambda name, split, _: read.append((name, split)) or rows)
    names = ("wikitext2", "c4", "news", "ptb")
    text_of(Characters(), *names, seq_len=4, samples=20)
    assert sorted(read) == sorted((name, split) for name in names for split in ("train", "validation"))


def test_the_dense_model_writes_once_what_is_trained_and_validated_on(data_dir, tokenizer):
    asked, written = [], random_windows(10 + HELD_OUT_WINDOWS, SEQ_LEN, seed=5)
    text = text_of(
        tokenizer, "self", "wikitext2", folder=data_dir, write=lambda count: asked.append(count) or written[:count], samples=20
    )
    assert asked == [10 + HELD_OUT_WINDOWS]
    assert sorted(text.rows.windows[text.parts == 0].tolist()) == sorted(written[:10].tolist())
    assert text.held_out["self"].windows.equal(written[10:]) and list(text.weights) == ["self", "wikitext2"]
    alone = text_of(tokenizer, "self", write=lambda count: written[:count], samples=10)
    assert alone.rows.windows.equal(written[:10]) and alone.rows.targets[:, 1:].all() and not alone.rows.targets[:, 0].any()


def test_text_that_the_dense_model_writes_needs_one(data_dir, tokenizer):
    with pytest.raises(UsageError, match="--dataset self is text that the dense model writes, and there is none here"):
        text_of(tokenizer, "wikitext2", "self", folder=data_dir)


def test_nothing_is_written_where_another_part_is_refused(tmp_path, tokenizer):
    (tmp_path / "own.txt").write_text("a")
    with pytest.raises(UsageError, match="shorter than one window"):
        text_of(tokenizer, "self", str(tmp_path / "own.txt"), write=lambda _: pytest.fail("written for nothing"))


def test_chats_are_strung_together_and_cut(chatting, tmp_path):
    name = chats_of(tmp_path, 60)
    text = text_of(chatting, name, samples=10, seq_len=64)
    stream, mask = [], []
    for ids, learned in encoded_chats(chatting, name, None, seed=3):
        stream, mask = stream + ids, mask + learned
    expected = [(stream[at : at + 64], [False, *mask[at + 1 : at + 64]]) for at in range(0, len(stream) - 63, 64)]
    expected = [window for window in expected if any(window[1])]
    rows = TrainingRows.joined([text.rows, text.held_out[name]])
    assert len(text.rows) == 10 and len(text.held_out[name]) == 16 and rows.windows.dtype == torch.int64
    assert list(zip(rows.windows.tolist(), rows.targets.tolist(), strict=True)) == expected[:26]
    assert rows.targets.dtype == torch.bool and not rows.targets[:, 0].any() and not rows.targets[:, 1:].all()


def test_alpaca_is_divided_as_a_file_is(chatting, tmp_path, caplog):
    (tmp_path / "alpaca").mkdir()
    chats_of(tmp_path / "alpaca", 60, "train.jsonl")
    text = text_of(chatting, "alpaca", samples=10**4, seq_len=32, folder=tmp_path)
    every = sum(len(ids) for ids, _ in encoded_chats(chatting, "alpaca", str(tmp_path), seed=3)) // 32
    held = len(text.held_out["alpaca"])
    assert 20 * held <= len(text.rows) + held <= every and held == (len(text.rows) + held) // 20 >= 1
    assert f"has {len(text.rows)} windows of 32 to train on, fewer than the 10000 asked for" in caplog.text


def test_a_window_without_an_answer_is_dropped():
    chats = [([1] * 10 + [2] * 2, [False] * 10 + [True] * 2), ([3] * 8, [True] * 8), ([4] * 4, [True, False, False, False])]
    rows = packed(iter(chats), 4, 99, "x")
    assert rows.windows.tolist() == [[1, 1, 2, 2], [3] * 4, [3] * 4], "the last window learns only what has no past"
    assert rows.targets.tolist() == [[False, False, True, True], [False, True, True, True], [False, True, True, True]]
    assert packed(iter(chats), 4, 2, "x").windows.tolist() == [[1, 1, 2, 2], [3] * 4]


def test_chats_are_read_until_there_are_enough():
    def endless():
        while True:
            yield [1] * 6, [False] * 5 + [True]

    assert packed(endless(), 4, 7, "x").windows.shape == (7, 4)


def test_chats_shorter_than_a_window_are_refused(chatting, tmp_path):
    with pytest.raises(UsageError, match="has chats of [0-9]+ tokens, and of them no window of 250 with an answer to learn"):
        text_of(chatting, chats_of(tmp_path, 1), seq_len=250)


def test_a_mixture_of_all_kinds(chatting, data_dir, tmp_path):
    name = chats_of(tmp_path, 100)
    text = text_of(
        chatting, "wikitext2:2", name, "self", samples=20, folder=data_dir, write=lambda count: random_windows(count, 16)
    )
    assert text.parts.bincount().tolist() == [10, 5, 5] and text.rows.windows.max() < VOCAB
    learned = [bool(text.rows.targets[text.parts == index, 1:].all()) for index in range(3)]
    assert learned == [True, False, True] and list(text.held_out) == ["wikitext2", name, "self"]


def test_the_fingerprint_is_that_of_everything_read(data_dir, tokenizer):
    text = text_of(tokenizer, "wikitext2", folder=data_dir)
    assert text.fingerprint() == text_of(tokenizer, "wikitext2", folder=data_dir).fingerprint()
    held = text.held_out["wikitext2"]
    changes = [
        {"rows": replace(text.rows, windows=text.rows.windows + 1)},
        {"rows": replace(text.rows, targets=~text.rows.targets)},
        {"parts": text.parts + 1},
        {"held_out": {}},
        {"held_out": {"wikitext2": replace(held, windows=held.windows + 1)}},
        {"held_out": {"wikitext2": replace(held, targets=~held.targets)}},
    ]
    others = {replace(text, **change).fingerprint() for change in changes}
    assert len(others | {text.fingerprint()}) == len(changes) + 1
