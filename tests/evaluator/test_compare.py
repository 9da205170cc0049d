"""What compared models share: windows, tokens that mean the same, and the minutes in which their speed is taken."""

from __future__ import annotations

import copy
import json

import pytest
from conftest import half_pruned, make_text, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.compare import baseline_first, measure_costs, shared_windows
from LLMPruner.model.load import load_tokenizer, save_model
from LLMPruner.model.source import find_model


@pytest.fixture(scope="module")
def sources(trained_dir, tmp_path_factory):
    """The dense model, and it with half of two layers removed, twice."""
    path = tmp_path_factory.mktemp("compared") / "pytorch_model.bin"
    save_model(path, half_pruned(trained_dir))
    pruned = find_model(str(path), "--pruned_model")
    return {"original": find_model(str(trained_dir), "--original_model"), "pruned": pruned, "finetuned": pruned}


@pytest.fixture
def common(data_dir) -> CommonConfig:
    return CommonConfig(dtype="float32", device="cpu", data_dir=str(data_dir))


def tokenizers_of(sources):
    return {role: load_tokenizer(source) for role, source in sources.items()}


def save_with_tokenizer(folder, vocab: int, text: str) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet))
    tiny_model(vocab_size=vocab).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize(("vocab", "text"), [(300, "zebra zebra xylophone " * 99 + make_text(9, 9)), (290, make_text(200, 0))])
def test_another_tokenizer_is_refused_by_the_flags_of_both_models(sources, common, tmp_path, vocab, text):
    """Another size, or the same size and other tokens."""
    save_with_tokenizer(tmp_path / "other", vocab, text)
    both = {"original": sources["original"], "finetuned": find_model(str(tmp_path / "other"), "--finetuned_model")}
    with pytest.raises(UsageError, match="the tokenizers of --original_model and --finetuned_model differ"):
        shared_windows(both, tokenizers_of(both), EvalConfig(), common.data_dir)


def test_a_tokenizer_with_a_token_more_is_another_one_even_where_the_text_has_it_not(sources, common, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["xylophone"])
    with pytest.raises(UsageError, match="the tokenizers of --original_model and --pruned_model differ"):
        shared_windows(sources, {"original": tokenizer, "pruned": larger}, EvalConfig(), common.data_dir)


def test_a_model_that_does_not_embed_the_tokens_is_refused_by_its_flag(sources, common, tokenizer, tmp_path):
    tiny_model(vocab_size=100).save_pretrained(tmp_path / "small")
    both = {"original": sources["original"], "pruned": find_model(str(tmp_path / "small"), "--pruned_model")}
    with pytest.raises(UsageError, match="--pruned_model embeds 100 tokens"):
        shared_windows(both, dict.fromkeys(both, tokenizer), EvalConfig(), common.data_dir)


def test_size_and_speed_are_of_every_model_side_by_side(sources, common, trained_dir):
    stray = trained_dir / "adapter_model.safetensors"  # beside the weights and none of them
    stray.write_bytes(b"not read")
    costs = measure_costs(sources, tokenizers_of(sources), common, EfficiencyConfig(prompt_tokens=8, new_tokens=2, repeats=1))
    assert list(costs) == list(sources) and json.dumps(costs)
    for role, source in sources.items():
        assert costs[role]["parameters"] == source.plan.total_params and costs[role]["prefill_rate"] > 0
    assert costs["pruned"]["kv_bytes_per_token"] < costs["original"]["kv_bytes_per_token"]
    stray.unlink()
    assert costs["original"]["file_bytes"] == (trained_dir / "model.safetensors").stat().st_size
    assert costs["pruned"]["file_bytes"] == sources["pruned"].path.stat().st_size
    assert list(baseline_first(sources, "finetuned")) == ["finetuned", "original", "pruned"]


def test_a_model_of_another_name_is_called_by_its_own_flag(sources, common, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["xylophone"])
    both = {"a=b": sources["original"], "my model": sources["pruned"]}
    with pytest.raises(UsageError, match="the tokenizers of --models a=b and --models my model differ"):
        shared_windows(both, {"a=b": tokenizer, "my model": larger}, EvalConfig(), common.data_dir)
