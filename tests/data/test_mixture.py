"""What fine-tuning is asked to read: entries with weights, and windows in integers."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from LLMPruner.config import CommonConfig
from LLMPruner.data.mixture import Part, as_typed, check_mixture, mixture, windows_of
from LLMPruner.errors import UsageError
from LLMPruner.training_config import FinetuneConfig


def of(*entries: str, samples: int = 1000, **settings) -> FinetuneConfig:
    return FinetuneConfig(dataset=entries, samples=samples, **settings)


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        (["wikitext2"], [("wikitext2", 1)]),
        (["wikitext2:7"], [("wikitext2", 1)]),
        (["wikitext2", "self"], [("wikitext2", 0.5), ("self", 0.5)]),
        (["wikitext2:3", "self"], [("wikitext2", 0.75), ("self", 0.25)]),
        (["a.txt:1e308", "self:1e308"], [("a.txt", 0.5), ("self", 0.5)]),
    ],
    ids=str,
)
def test_weights_are_shares_of_the_whole(entries, parts):
    assert mixture(of(*entries)) == tuple(Part(*part) for part in parts)


def test_a_path_that_is_there_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mixture(of("a:2", "b")) == (Part("a", 2 / 3), Part("b", 1 / 3))
    Path("a:2").write_text("a")
    assert mixture(of("a:2", "b")) == (Part("a:2", 0.5), Part("b", 0.5))
    assert mixture(of("a:2:3", "b")) == (Part("a:2", 0.75), Part("b", 0.25))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "", "much"])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(UsageError, match=f"--finetune_dataset wikitext2:{weight}: there is no such file, and '{weight}' is no"):
        mixture(of(f"wikitext2:{weight}", prefix="--finetune_"))


@pytest.mark.parametrize("entries", [("self", "ptb", "self:2"), ("a.txt", "./a.txt")])
def test_a_name_twice_is_refused_however_it_is_spelled(entries):
    with pytest.raises(UsageError, match="--dataset names .* twice"):
        mixture(of(*entries))


def test_no_entry_is_refused():
    with pytest.raises(UsageError, match="--dataset needs at least one corpus"):
        mixture(of())


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(6, 5000))
def test_windows_are_split_in_integers_by_largest_remainder(weights, samples):
    config = of(*(f"{index}:{weight!r}" for index, weight in enumerate(weights)), samples=samples)
    quotas = [weight / sum(weights) * samples for weight in weights]
    try:
        counts = windows_of(mixture(config), config)
    except UsageError:
        assert min(quotas) < 1
        return
    assert sum(counts) == samples and min(counts) >= 1
    assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
    ups = [quota - math.floor(quota) for count, quota in zip(counts, quotas, strict=True) if count > quota]
    downs = [quota - math.floor(quota) for count, quota in zip(counts, quotas, strict=True) if count < quota]
    assert not ups or not downs or min(ups) >= max(downs) - 1e-6


def test_a_part_without_a_window_is_refused():
    config = of("wikitext2:999", "self:0.1", samples=100, prefix="--finetune_")
    with pytest.raises(UsageError, match="--finetune_samples 100 leaves self no window at its weight"):
        windows_of(mixture(config), config)
    config = of("wikitext2", "self", "ptb", samples=2)
    with pytest.raises(UsageError, match="--samples 2 leaves ptb no window"):
        windows_of(mixture(config), config)


def test_the_entries_are_recorded_as_they_would_be_typed():
    assert as_typed(of("wikitext2")) == "wikitext2" and as_typed(of("wikitext2:0.5", "self:0.5")) == "wikitext2:0.5 self:0.5"
    assert shlex.split(as_typed(of("a b.txt:2", "ptb"))) == ["a b.txt:2", "ptb"]


def refusal(folder, *entries: str) -> str:
    with pytest.raises(UsageError) as caught:
        check_mixture(of(*entries, seq_len=16), CommonConfig(data_dir=str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_part_is_checked_without_a_tokenizer(data_dir, tmp_path):
    check_mixture(of("wikitext2:0.5", "self:0.5", seq_len=16), CommonConfig(data_dir=str(data_dir)))
    assert "unknown corpus 'nothere': use one of alpaca, c4, news, ptb, self, wikitext2, or" in refusal(
        data_dir, "self", "nothere"
    )
    assert "must end in .txt, .parquet, .jsonl" in refusal(data_dir, __file__)
    assert "is not a folder" in refusal(tmp_path / "nowhere", "alpaca")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": "none"}))
    assert "line 1 has a string as its messages" in refusal(data_dir, "wikitext2", f"{path}:2")
    path.write_text(json.dumps({"label": "none"}))
    assert "has no text column: found label" in refusal(data_dir, f"{path}")
    path.write_text(json.dumps({"text": "short"}))
    assert "has 5 bytes: shorter than one window of 16" in refusal(data_dir, f"{path}")


def test_the_checks_do_not_wait_for_torch(data_dir, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    code = f"""import sys
from LLMPruner.config import CommonConfig
from LLMPruner.training_config import FinetuneConfig
from LLMPruner.data.mixture import check_mixture
check_mixture(FinetuneConfig(dataset=("wikitext2", {str(path)!r}, "self")), CommonConfig(data_dir={str(data_dir)!r}))
import LLMPruner.data.training
print("torch" in sys.modules)"""
    folder = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
