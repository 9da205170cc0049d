"""A model's tokenizer: the same from every source, and nothing but a tokenizer is taken from a file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_text
from transformers.utils import logging as transformers_logging

from LLMPruner.errors import RunError, UsageError
from LLMPruner.model.source import find_model
from LLMPruner.model.tokenizer import TOKENIZER_FILES, load_tokenizer, quiet_transformers, tokenizer_files

FLAG = "--base_model"
TEXT = make_text(3, seed=5)


def test_the_tokenizer_is_the_models_from_a_directory_and_from_our_bin(pruned_bin, model_dir, tokenizer):
    for path in (pruned_bin()[0], model_dir()):
        copy = load_tokenizer(find_model(str(path), FLAG))
        assert copy(TEXT).input_ids == tokenizer(TEXT).input_ids and len(copy) == len(tokenizer)
        assert (copy.bos_token, copy.eos_token, copy.pad_token) == (
            tokenizer.bos_token,
            tokenizer.eos_token,
            tokenizer.pad_token,
        )


def test_no_weight_is_needed_for_it(model_dir, tokenizer):
    source = find_model(str(model_dir()), FLAG)
    (source.path / "model.safetensors").unlink()
    assert load_tokenizer(source)(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_its_files_are_those_that_make_it_again(tokenizer, model_dir):
    files = tokenizer_files(tokenizer)
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys() <= set(TOKENIZER_FILES)
    folder = model_dir()
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    again = load_tokenizer(find_model(str(folder), FLAG))
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert tokenizer_files(again)["tokenizer.json"] == files["tokenizer.json"]


def test_a_directory_without_a_tokenizer_or_with_a_broken_one_is_refused(model_dir):
    source = find_model(str(model_dir()), FLAG)
    (source.path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="has no usable tokenizer"):
        load_tokenizer(source)
    (source.path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="has no tokenizer.json"):
        load_tokenizer(source)


@pytest.mark.parametrize("name", ["../outside.json", "modeling.py", "/tmp/outside.json"])
def test_a_file_that_is_no_tokenizers_is_refused_and_not_written(pruned_bin, tmp_path, monkeypatch, name):
    source = find_model(str(pruned_bin()[0]), FLAG)
    files = {name: "evil"} | json.loads(source.meta["__tokenizer__"])
    evil = replace(source, meta={**source.meta, "__tokenizer__": json.dumps(files)})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RunError, match="carries an unexpected tokenizer file"):
        load_tokenizer(evil)
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin"}


def test_transformers_speaks_again_afterwards_also_after_a_failure():
    before = transformers_logging.get_verbosity()
    with pytest.raises(KeyError), quiet_transformers():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert transformers_logging.get_verbosity() == before and transformers_logging.is_progress_bar_enabled()
