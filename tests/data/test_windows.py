"""Windows: cut in the order of the text, drawn by a seed, held out, and mixed; every stage reads its own split."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from conftest import random_windows
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.config import CommonConfig, EvalConfig, PruneConfig
from LLMPruner.data.training import training_text
from LLMPruner.data.windows import (
    IGNORED,
    PruneWindows,
    bos_token,
    evaluation_windows,
    fingerprint,
    held_out_tokens,
    interleaved,
    load_windows,
    mixed,
    prune_windows,
    read_alike,
    token_ids,
)
from LLMPruner.errors import UsageError
from LLMPruner.training_config import FinetuneConfig


class Characters:
    """A tokenizer of one token a character, so that windows can be told from the text; it remembers what it read.

    `bos` is its BOS token, which it `adds` to what it reads or not.
    """

    def __init__(self, shift: int = 0, bos: str | None = None, adds: bool = False) -> None:
        self.shift, self.read, self.bos, self.adds = shift, [], bos, adds
        self.bos_token_id = None if bos is None else ord(bos)

    def __call__(self, text, verbose=True, add_special_tokens=True):
        self.read.append(text)
        first = [self.bos_token_id] if self.adds and add_special_tokens else []
        return type("Encoding", (), {"input_ids": first + [ord(char) + self.shift for char in text]})


def write(folder, corpus: str, split: str, *rows: str) -> None:
    (folder / corpus).mkdir(exist_ok=True)
    (folder / corpus / f"{split}.txt").write_text("\n".join(rows))


def words(windows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in windows]


@pytest.fixture
def splits(tmp_path) -> str:
    """A --data_dir whose splits are made of one letter each, with 400 letters; ptb has no train split."""
    for split in ("train", "validation", "test"):
        write(tmp_path, "wikitext-2-raw", split, 400 * split[0])
    write(tmp_path, "ptb", "test", 400 * "p")
    return str(tmp_path)


def test_windows_do_not_overlap_and_keep_the_order_of_the_text(tmp_path):
    write(tmp_path, "ptb", "test", "abcdefghijk")
    windows = load_windows(Characters(), "ptb", "test", seq_len=3, data_dir=str(tmp_path))
    assert words(windows) == ["abc", "def", "ghi"]
    assert windows.dtype == torch.int64


@pytest.mark.parametrize("samples", [2, 3, 7, 25])
def test_samples_are_spread_evenly_from_the_first_window_to_the_last(tmp_path, samples):
    write(tmp_path, "ptb", "test", "".join(chr(100 + index) for index in range(50)))
    windows = load_windows(Characters(), "ptb", "test", seq_len=2, samples=samples, data_dir=str(tmp_path))
    starts = [(int(row[0]) - 100) // 2 for row in windows]
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert len(starts) == samples and starts[0] == 0 and starts[-1] == 24 and max(gaps) - min(gaps) <= 1


def test_a_seed_draws_the_same_distinct_windows_every_time(data_dir, tokenizer):
    def draw(seed):
        return load_windows(tokenizer, "wikitext2", "train", seq_len=16, samples=9, data_dir=str(data_dir), seed=seed)

    everything = load_windows(tokenizer, "wikitext2", "train", seq_len=16, data_dir=str(data_dir))
    evenly = load_windows(tokenizer, "wikitext2", "train", seq_len=16, samples=9, data_dir=str(data_dir))
    assert torch.equal(draw(1), draw(1)) and len(draw(1)) == 9
    assert not torch.equal(draw(1), draw(2)) and not torch.equal(draw(1), evenly)
    assert {tuple(row.tolist()) for row in draw(1)} <= {tuple(row.tolist()) for row in everything}


def test_more_samples_than_windows_give_all_of_them(data_dir, tokenizer, caplog):
    everything = load_windows(tokenizer, "ptb", "test", seq_len=64, data_dir=str(data_dir))
    caplog.set_level(logging.WARNING, "LLMPruner")
    asked = load_windows(tokenizer, "ptb", "test", seq_len=64, samples=10**6, data_dir=str(data_dir), seed=3)
    assert torch.equal(asked, everything)
    assert f"has {len(everything)} windows of 64, fewer than the 1000000 asked for" in caplog.text


def test_a_split_shorter_than_a_window_is_refused(tmp_path):
    write(tmp_path, "ptb", "test", "short")
    assert len(load_windows(Characters(), "ptb", "test", seq_len=5, data_dir=str(tmp_path))) == 1
    with pytest.raises(UsageError, match="corpus ptb, split test, has 5 tokens: shorter than one window of 6"):
        load_windows(Characters(), "ptb", "test", seq_len=6, data_dir=str(tmp_path))


def test_a_file_that_has_no_splits_is_warned_of_where_something_is_measured_on_it(tmp_path, caplog):
    (tmp_path / "own.txt").write_text("abcdef")
    for split, warned in (("train", False), ("test", True)):
        caplog.clear()
        load_windows(Characters(), str(tmp_path / "own.txt"), split, seq_len=2)
        assert ("has no splits" in caplog.text) == warned


def test_a_split_is_read_once_for_all_its_windows(tmp_path):
    write(tmp_path, "ptb", "test", "abcdefghijk")
    reader = Characters()
    for seq_len in (2, 3):
        load_windows(reader, "ptb", "test", seq_len=seq_len, data_dir=str(tmp_path))
    assert reader.read == ["abcdefghijk"]
    assert token_ids(reader, "ptb", "test", str(tmp_path)).tolist() == [ord(char) for char in "abcdefghijk"]


@pytest.mark.parametrize("adds", [True, False])
def test_every_window_begins_with_the_bos_token_once_where_it_is_asked_for(tmp_path, adds):
    write(tmp_path, "ptb", "test", "abcdefghijk")
    reader, place = Characters(bos="<", adds=adds), {"data_dir": str(tmp_path)}
    assert words(load_windows(reader, "ptb", "test", seq_len=4, bos=ord("<"), **place)) == ["<abc", "<def", "<ghi"]
    drawn = words(load_windows(reader, "ptb", "test", seq_len=4, samples=2, seed=0, bos=ord("<"), **place))
    assert len(drawn) == 2 and set(drawn) < {"<abc", "<def", "<ghi"}
    plain = words(load_windows(reader, "ptb", "test", seq_len=4, **place))
    assert plain == (["<abc", "defg", "hijk"] if adds else ["abcd", "efgh"])


@pytest.mark.parametrize(
    ("wanted", "bos", "adds", "expected"),
    [
        ("auto", "<", True, "<"),
        ("auto", "<", False, None),
        ("auto", None, False, None),
        ("on", "<", False, "<"),
        ("on", "<", True, "<"),
        ("off", "<", True, None),
        ("off", None, False, None),
    ],
)
def test_calibration_windows_begin_as_the_model_is_served_unless_told_otherwise(wanted, bos, adds, expected):
    assert bos_token(Characters(bos=bos, adds=adds), wanted) == (expected and ord(expected))


def test_a_bos_token_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(UsageError, match="--calibration_bos on needs a tokenizer with a BOS token"):
        bos_token(Characters(), "on")


def c4(tmp_path, reader: Characters, **options) -> list[str]:
    """Windows of four letters; a hundred documents of four equal letters each."""
    write(tmp_path, "c4", "train", *(chr(200 + index) * 4 for index in range(100)))
    return words(load_windows(reader, "c4", "train", seq_len=4, data_dir=str(tmp_path), **options))


def test_of_a_corpus_too_large_only_as_many_random_documents_as_are_needed_are_read(tmp_path):
    reader = Characters()
    drawn = c4(tmp_path, reader, samples=5, seed=1)
    assert len(drawn) == 5 and 4 <= len(reader.read) <= 5, "of the four blank lines between them, one window more"
    letters = {char for row in drawn for char in row if char != "\n"}
    assert len(letters) == len(reader.read) and letters != {chr(200 + index) for index in range(len(letters))}
    assert drawn == c4(tmp_path, Characters(), samples=5, seed=1) != c4(tmp_path, Characters(), samples=5, seed=2)
    assert c4(tmp_path, Characters(), samples=3, seed=1) == drawn[:3]


def test_all_windows_of_a_corpus_too_large_are_its_whole_text_in_order(tmp_path):
    text = "\n\n".join(chr(200 + index) * 4 for index in range(100))
    assert "".join(c4(tmp_path, Characters())) == text[: len(text) // 4 * 4]


def test_more_windows_than_a_corpus_read_in_part_has_are_all_it_has(tmp_path, caplog):
    drawn = c4(tmp_path, Characters(), samples=1000, seed=1)
    assert len(drawn) == (100 * 4 + 99 * 2) // 4 and "fewer than the 1000 asked for" in caplog.text


def test_two_tokenizers_read_alike_where_they_make_the_same_tokens(splits, tmp_path):
    write(tmp_path, "c4", "test", *("abcd" * 3 for _ in range(5)))
    for names, samples in ((("wikitext2", "ptb"), 0), (("c4",), 2), (("c4",), 0)):
        config = EvalConfig(names, seq_len=4, samples=samples)
        assert read_alike(Characters(), Characters(), config, splits)
        assert not read_alike(Characters(), Characters(shift=1), config, splits)


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_quarter_of_the_windows_is_held_out_or_the_end_of_each(windows, seq_len):
    held = held_out_tokens(windows, seq_len)
    assert held.shape == (windows, seq_len) and held.any()
    if windows >= 4:
        assert held.all(1).sum() == windows // 4 and not held[:3].any() and held[3].all() and (held.all(1) == held.any(1)).all()
    else:
        assert torch.equal(held, torch.arange(seq_len).expand(windows, -1) >= seq_len - max(1, seq_len // 4))


@pytest.mark.parametrize("shape, expected", [((9, 4), 2 * 4), ((2, 8), 2 * 2), ((1, 3), 1), ((3, 1), 3)])
def test_some_tokens_are_held_out_of_few_windows_as_well(shape, expected):
    held = held_out_tokens(*shape)
    assert held.shape == shape and held.sum() == expected
    assert shape[1] == 1 or not held.all()


@pytest.mark.parametrize("counts", [(6, 6), (5, 2), (4, 0), (1, 1)], ids=str)
def test_any_first_part_of_interleaved_windows_holds_both_kinds_alike(counts):
    windows, written = torch.arange(counts[0]).unsqueeze(1), 100 + torch.arange(counts[1]).unsqueeze(1)
    one, same, other = (interleaved(windows, written, seed=seed)[:, 0].tolist() for seed in (0, 0, 1))
    assert one == same and sorted(one) == [*range(counts[0]), *range(100, 100 + counts[1])]
    assert len(one) < 6 or one != other, "the first windows of the text are always first"
    for length in range(1, len(one) + 1):
        assert abs(sum(row >= 100 for row in one[:length]) - length * counts[1] / len(one)) <= 1


def test_mixed_holds_all_windows_in_another_order():
    windows, written = random_windows(8, 4, seed=1), random_windows(4, 4, seed=2)
    both = mixed(windows, written, seed=0)
    assert sorted(both.tolist()) == sorted([*windows.tolist(), *written.tolist()])
    assert not torch.equal(both[:8], windows)
    assert torch.equal(both, mixed(windows, written, seed=0)) and not torch.equal(both, mixed(windows, written, seed=1))


PRUNE = PruneConfig(
    layer_importance_samples=3,
    layer_importance_seq_len=5,
    channel_importance_samples=4,
    repair_samples=6,
    calibration_seq_len=7,
    search_tokens=21,
    pruning_strategy="search",
)


def test_every_stage_of_a_run_reads_its_own_split_and_its_own_size(splits):
    common = CommonConfig(data_dir=splits)
    evaluation = EvalConfig(("wikitext2", "ptb"), seq_len=9, samples=2)
    options = {"analyzes": True, "calibrates": True, "evaluation": evaluation}
    windows = prune_windows(Characters(), PRUNE, common, **options)
    assert words(windows.layers) == ["t" * 5] * 3 and words(windows.calibration) == ["t" * 7] * 4
    assert words(windows.repair) == ["t" * 7] * 6
    assert words(windows.held_out) == ["v" * 7] * 2, "half of the search's tokens; the dense model writes the others"
    assert {name: words(rows) for name, rows in windows.evaluation.items()} == {
        "wikitext2": ["t" * 9] * 2,
        "ptb": ["p" * 9] * 2,
    }
    assert len(windows.all()) == 6 and all(rows is not None for rows in windows.all())


def test_calibration_begins_with_the_bos_token_and_what_is_reported_does_not(splits):
    """A window of the report or of fine-tuning is a piece of text like any other."""
    evaluation, finetune = EvalConfig(("ptb",), seq_len=9, samples=2), FinetuneConfig(samples=8, seq_len=10)
    options = {"analyzes": True, "calibrates": True, "evaluation": evaluation}
    trained = training_text(Characters(bos="<"), finetune, CommonConfig(data_dir=splits)).rows.windows
    windows = prune_windows(Characters(bos="<"), replace(PRUNE, calibration_bos="on"), CommonConfig(data_dir=splits), **options)
    assert words(windows.layers) == ["<tttt"] * 3 and words(windows.held_out) == ["<vvvvvv"] * 2
    assert words(windows.calibration) == ["<tttttt"] * 4 and words(windows.repair) == ["<tttttt"] * 6
    assert words(trained) == ["t" * 10] * 8 and words(windows.evaluation["ptb"]) == ["p" * 9] * 2


def test_the_splits_that_calibration_and_the_report_read_are_two(tmp_path):
    for split, letter in (("train", "a"), ("test", "z")):
        write(tmp_path, "wikitext-2-raw", split, 400 * letter)
    reader, common = Characters(), CommonConfig(data_dir=str(tmp_path))
    assert set(words(training_text(reader, FinetuneConfig(samples=3, seq_len=4), common).rows.windows)) == {"aaaa"}
    assert set(words(evaluation_windows(reader, EvalConfig(seq_len=4), str(tmp_path))["wikitext2"])) == {"zzzz"}
    assert set(words(evaluation_windows(reader, EvalConfig(seq_len=4), str(tmp_path), "train")["wikitext2"])) == {"aaaa"}


def test_a_stage_that_does_not_run_reads_nothing(tmp_path):
    config = PruneConfig(calibration_dataset="no such corpus")
    windows = prune_windows(Characters(), config, CommonConfig(data_dir=str(tmp_path)), analyzes=False, calibrates=False)
    assert windows == PruneWindows() and not any(rows is not None for rows in windows.all())


def test_the_seed_draws_the_windows_of_a_run(data_dir, tokenizer):
    def drawn(seed: int) -> list[torch.Tensor]:
        common = CommonConfig(seed=seed, data_dir=str(data_dir))
        windows = prune_windows(tokenizer, PRUNE, common, analyzes=True, calibrates=True)
        return [rows for rows in windows.all() if rows is not None]

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert len(one) == 4 and all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def both_formats(tmp_path) -> str:
    """A --data_dir whose text has a letter twice and, raw alone, line ends after it."""
    for folder in ("wikitext-2-raw", "c4"):
        for split in ("train", "validation", "test"):
            write(tmp_path, folder, split, *(["aa", ""] * 100))
    return str(tmp_path)


def is_raw(windows: torch.Tensor | None) -> bool:
    return "\n" * 5 in "".join(words(windows))


@pytest.mark.parametrize("corpus", ["wikitext2", "c4"])
@pytest.mark.parametrize("text_format", ["clean", "raw"])
def test_the_text_format_of_a_run_reaches_the_windows_of_every_stage(both_formats, corpus, text_format):
    common, evaluation = CommonConfig(data_dir=both_formats, text_format=text_format), EvalConfig((corpus,), 9, 2)
    config, training = replace(PRUNE, calibration_dataset=corpus), FinetuneConfig(samples=8, seq_len=10, dataset=(corpus,))
    windows = prune_windows(Characters(), config, common, analyzes=True, calibrates=True, evaluation=evaluation)
    found = [rows for rows in windows.all() if rows is not None] + training_text(Characters(), training, common).all()
    assert len(found) == 7 and all("\n" in "".join(words(rows)) for rows in found)
    assert {is_raw(rows) for rows in found} == {text_format == "raw"}


def test_one_process_reads_both_formats(both_formats):
    reader, place = Characters(), {"seq_len": 8, "data_dir": both_formats}
    for samples in (0, 4):
        for text_format in ("clean", "raw", "clean"):
            for corpus in ("wikitext2", "c4"):
                rows = load_windows(reader, corpus, "test", samples=samples, text_format=text_format, **place)
                assert is_raw(rows) == (text_format == "raw"), "nothing cached may be of the other format"


def test_tokenizers_are_compared_on_the_text_that_is_measured(tmp_path):
    class Blind(Characters):
        def __call__(self, text, **options):
            return super().__call__(text.replace("\n" * 5, "\n\n"), **options)

    write(tmp_path, "wikitext-2-raw", "test", *(["aa", ""] * 20))
    for text_format, alike in (("clean", True), ("raw", False)):
        config = EvalConfig(seq_len=4, text_format=text_format)
        assert read_alike(Characters(), Blind(), config, str(tmp_path)) == alike


def test_a_copy_of_wikitext_without_its_empty_rows_is_warned_of_where_it_is_read_raw(tmp_path, caplog):
    write(tmp_path, "wikitext-2-raw", "train", "a", "", "b")
    write(tmp_path, "wikitext-2-raw", "test", "a", "b")
    for split, text_format, warned in (("test", "raw", True), ("test", "clean", False), ("train", "raw", False)):
        caplog.clear()
        load_windows(Characters(), "wikitext2", split, seq_len=2, data_dir=str(tmp_path), text_format=text_format)
        assert ("has no empty rows here" in caplog.text) == warned


def test_a_text_format_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="--text_format must be clean or raw, got papers"):
        CommonConfig(text_format="papers")


def test_strided_windows_overlap_and_cover_the_text_in_order(tokenizer, data_dir):
    ids = token_ids(tokenizer, "ptb", "test", str(data_dir))
    windows = load_windows(tokenizer, "ptb", "test", seq_len=32, stride=8, data_dir=str(data_dir))
    full = (len(ids) - 32) // 8 + 1
    assert (len(ids) - 32) % 8 and len(windows) == full + 1, "the last one has what is left, or this test proves nothing"
    padded = torch.cat([ids, torch.full((32,), IGNORED)])
    assert all(row.equal(padded[8 * place : 8 * place + 32]) for place, row in enumerate(windows))
    assert windows[-1, -8] == ids[8 * full + 24] and windows[-1, -1] == IGNORED
    side_by_side = load_windows(tokenizer, "ptb", "test", seq_len=32, data_dir=str(data_dir))
    assert windows[:full:4].equal(side_by_side) and fingerprint(windows) != fingerprint(side_by_side)
    some = load_windows(tokenizer, "ptb", "test", seq_len=32, stride=8, samples=5, data_dir=str(data_dir))
    assert some[0].equal(windows[0]) and some[-1].equal(windows[-2]) and len(some) == 5
