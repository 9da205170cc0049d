"""A model's tokenizer: the same from every source, and nothing but a tokenizer is taken from a file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_text
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from LLMPruner.config import ExportConfig
from LLMPruner.errors import RunError, UsageError
from LLMPruner.export.writer import write_exports
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.model.tokenizer import PROBES, TOKENIZER_FILES, load_tokenizer, quiet_transformers, tokenizer_files

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


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2TokenizerFast", None])
def test_ids_are_those_of_the_file_whatever_class_is_named(model_dir, tmp_path, name):
    """transformers 5 rebuilds a byte-level tokenizer.json as SentencePiece where the class is LlamaTokenizerFast."""
    folder = model_dir()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": name, "legacy": True}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (*PROBES, TEXT, "<s>in  the\n\n city</s>")
    loaded = load_model(find_model(str(folder), FLAG), dtype="float32", device="cpu")
    save_model(tmp_path / "m.bin", loaded)
    write_exports(loaded, ExportConfig(("hf", "padded")), tmp_path / "out", {})
    readers = [
        loaded.tokenizer,
        load_tokenizer(find_model(str(tmp_path / "m.bin"), FLAG)),
        *(AutoTokenizer.from_pretrained(tmp_path / "out" / form, trust_remote_code=True) for form in ("hf", "padded")),
    ]
    for reader in readers:
        assert all(reader(text).input_ids == wanted.encode(text).ids for text in texts)
        assert reader.decode(reader(TEXT).input_ids) == TEXT


def test_a_tokenizer_that_transformers_reads_otherwise_than_its_file_is_refused(model_dir, monkeypatch):
    source = find_model(str(model_dir()), FLAG)
    spoiled = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    spoiled.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), spoiled.pre_tokenizer])
    other = PreTrainedTokenizerFast(tokenizer_object=spoiled)
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: other)
    file = source.path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"]["12"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [*state["model"]["merges"], ["1", "2"]]
    file.write_text(json.dumps(state))
    with pytest.raises(UsageError, match="makes other ids of its tokenizer than its tokenizer.json says"):
        load_tokenizer(source)


def test_truncation_in_the_file_is_no_difference(model_dir):
    source = find_model(str(model_dir()), FLAG)
    file = source.path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(file))
    assert len(load_tokenizer(source)(TEXT).input_ids) > 4


def test_named_chat_templates_survive_the_bin(model_dir, tmp_path):
    folder = model_dir()
    path = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    loaded = load_model(find_model(str(folder), FLAG), dtype="float32", device="cpu")
    save_model(tmp_path / "m.bin", loaded)
    wanted = {"default": "a", "tool_use": "b"}
    assert load_tokenizer(find_model(str(tmp_path / "m.bin"), FLAG)).chat_template == loaded.tokenizer.chat_template == wanted


def test_a_chat_template_that_is_no_text_is_refused(model_dir):
    source = find_model(str(model_dir()), FLAG)
    path = source.path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 5}))
    with pytest.raises(UsageError, match="has a chat_template that is no text"):
        load_tokenizer(source)
