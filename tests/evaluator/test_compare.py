"""Several models over the same windows: cut once, one model at a time, and no comparison across tokenizers."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
from conftest import half_pruned, make_text, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from LLMPruner.config import CommonConfig, EfficiencyConfig, EvalConfig
from LLMPruner.errors import UsageError
from LLMPruner.evaluator import ppl
from LLMPruner.evaluator.compare import compare, measure_costs, measure_model, shared_windows
from LLMPruner.evaluator.ppl import measure
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import load_model, load_tokenizer, save_model
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


def test_all_models_see_the_same_windows_one_model_at_a_time(sources, common, monkeypatch):
    seen, alive = [], []

    def spy(model, windows, label, split):
        assert all(other() is None for other in alive), "another model is still in memory"
        alive.append(weakref.ref(model))
        model.itself = [model]  # so that it goes only where it is collected
        seen.append(windows["wikitext2"].clone())
        return measure(model, windows, label, split)

    monkeypatch.setattr(ppl, "measure", spy)
    gc.disable()  # what is freed is freed by the script, not by chance
    try:
        compare(sources, EvalConfig(seq_len=32, samples=7), common)
    finally:
        gc.enable()
    assert len(seen) == 3 and seen[0].shape == (7, 32) and seen[0].equal(seen[1]) and seen[0].equal(seen[2])


def test_the_record_holds_every_measurement_and_where_it_was_made(sources, common, capsys):
    evaluation = EvalConfig(("wikitext2", "ptb"), 32, 5)
    record = json.loads(json.dumps(compare(sources, evaluation, common, lang="en"), allow_nan=False))
    assert list(record["models"]) == ["original", "pruned", "finetuned"] and "efficiency" not in record
    assert (record["device"], record["dtype"], record["seq_len"], record["samples"]) == ("cpu", "float32", 32, 5)
    assert record["windows"] == {"wikitext2": 5, "ptb": 5}
    table = capsys.readouterr().out
    windows = shared_windows(
        sources, {role: load_tokenizer(source) for role, source in sources.items()}, evaluation, common.data_dir
    )
    for role, source in sources.items():
        row, model = record["models"][role], load_model(source, dtype="float32", device="cpu").model
        assert row["path"] == str(source.path) and row["parameters"] == source.plan.total_params
        assert row["ppl"] == {result.corpus: result.as_dict() for result in measure(LayerRunner.of(model), windows, role)}
        assert f"{row['ppl']['ptb']['ppl']:.2f}" in table
    assert "PPL comparison" in table


def test_a_measured_model_is_what_the_plain_functions_measure(sources, common):
    windows = {
        "ptb": shared_windows(
            sources, {"pruned": load_tokenizer(sources["pruned"])}, EvalConfig(("ptb",), 64, 3), common.data_dir
        )["ptb"]
    }
    own = measure(load_model(sources["pruned"], dtype="float32", device="cpu").runner, windows, "pruned")
    assert measure_model(sources["pruned"], load_tokenizer(sources["pruned"]), windows, "pruned", common) == own


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


def test_size_and_speed_are_of_every_model_side_by_side(sources, common, capsys):
    costs = measure_costs(sources, tokenizers_of(sources), common, EfficiencyConfig(prompt_tokens=8, new_tokens=2, repeats=1))
    assert list(costs) == list(sources) and json.dumps(costs)
    for role, source in sources.items():
        assert costs[role]["parameters"] == source.plan.total_params and costs[role]["prefill_rate"] > 0
    assert costs["pruned"]["kv_bytes_per_token"] < costs["original"]["kv_bytes_per_token"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Efficiency on cpu, float32") and lines[1].split() == list(sources)
