"""What is generated is the greedy text, with and without a cache; its figures count n-grams; columns line up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import random_windows, tiny_model
from tokenizers.processors import TemplateProcessing

from LLMPruner.errors import UsageError
from LLMPruner.evaluator.columns import beside, width, wrapped
from LLMPruner.evaluator.generate import Generation, distinct, generate, greedy, prompt_ids, side_by_side, stop_tokens
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model

PROMPT = "The cat chases"


@pytest.fixture
def loaded(trained_dir):
    return load_model(find_model(str(trained_dir), "--model_path"), dtype="float32", device="cpu")


def test_greedy_text_is_the_likeliest_token_each_time_and_what_transformers_generates():
    model, prompt = tiny_model(), random_windows(1, 7)
    ids = greedy(model, prompt, 9)
    assert ids.equal(greedy(model, prompt, 9, use_cache=False)) and ids.shape == (1, 16) and ids[:, :7].equal(prompt)
    with torch.no_grad():
        assert model(ids).logits[0, 6:-1].argmax(-1).equal(ids[0, 7:])
    plain = model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert ids.equal(plain)
    model.generation_config.repetition_penalty = 5.0  # a model's own penalty hides what is looked for
    assert ids.equal(greedy(model, prompt, 9))
    assert greedy(model, prompt, 9, stops={ids[0, 9].item()}).equal(ids[:, : ids[0, 7:].tolist().index(ids[0, 9]) + 8])


def test_an_answer_has_its_figures_and_no_end_of_text(loaded):
    found = generate(loaded, PROMPT, new_tokens=12)
    ids = prompt_ids(loaded.tokenizer, PROMPT)
    answer = greedy(loaded.model, ids, 12, stops=stop_tokens(loaded.model))[0, ids.shape[1] :].tolist()
    assert found.text == loaded.tokenizer.decode(answer) and found.tokens == 12 and not found.ended
    assert found.distinct == {size: distinct(answer, size) for size in (1, 2, 3)}
    assert found.repetition == pytest.approx(1 - len({tuple(answer[i : i + 4]) for i in range(9)}) / 9)
    loaded.model.generation_config.eos_token_id = [1, answer[3]]
    cut = generate(loaded, PROMPT, new_tokens=12)
    stop = answer.index(answer[3])
    assert cut.ended and cut.tokens == stop and cut.text == loaded.tokenizer.decode(answer[:stop])
    assert cut.repetition is None and cut.as_dict()["distinct"]["3"] == (1.0 if stop == 3 else None)


def test_n_grams_are_counted():
    assert distinct([1, 2, 1, 2, 1], 1) == 2 / 5 and distinct([1, 2, 1, 2, 1], 2) == 2 / 4 and distinct([1, 2], 3) is None


def test_a_chat_template_is_used_where_there_is_one(loaded):
    plain = prompt_ids(loaded.tokenizer, PROMPT)
    assert plain.tolist() == [loaded.tokenizer(PROMPT).input_ids]
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    loaded.tokenizer.backend_tokenizer.post_processor = adds_bos
    assert prompt_ids(loaded.tokenizer, PROMPT)[0, 0] == 0
    loaded.tokenizer.chat_template = "{{ bos_token }}Q {{ messages[0].content }}{% if add_generation_prompt %} A{% endif %}"
    asked = prompt_ids(loaded.tokenizer, PROMPT)
    assert loaded.tokenizer.decode(asked[0]) == f"<s>Q {PROMPT} A" and asked[0].eq(0).sum() == 1
    loaded.tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(UsageError, match="chat template does not take .* no users"):
        prompt_ids(loaded.tokenizer, PROMPT)
    loaded.tokenizer.chat_template = None


def test_what_cannot_be_answered_is_refused_in_one_sentence(loaded, monkeypatch):
    for prompt, new_tokens, words in (("  ", 4, "prompt that says something"), (PROMPT, 255, "more than 256 positions")):
        with pytest.raises(UsageError, match=words):
            generate(loaded, prompt, new_tokens=new_tokens)
    monkeypatch.setattr("LLMPruner.evaluator.generate.prompt_ids", lambda *_: torch.tensor([[5, 300]]))
    with pytest.raises(UsageError, match="token 300, the model embeds 300"):
        generate(loaded, PROMPT, new_tokens=4)
    with pytest.raises(UsageError, match="without --stream on"):
        generate(SimpleNamespace(streamed=object()), PROMPT, new_tokens=4)


def test_lines_are_broken_at_blanks_and_by_the_columns_they_take():
    assert wrapped("the cat sees the dog", 9) == ["the cat", "sees the", "dog"]
    assert wrapped("猫猫猫", 5) == ["猫猫", "猫"] and width("猫e\u0301") == 3
    assert wrapped("one\n\ntwo", 9) == ["one", "", "two"] and wrapped("", 9) == [""]
    assert wrapped("a\x1b[31mb", 20) == ["a\ufffd[31mb"]
    assert wrapped("abcdefgh", 3) == ["abc", "def", "gh"]


def test_answers_stand_side_by_side():
    one = Generation("The cat sees the dog.", 6, True, {1: 0.8, 2: 1.0, 3: 1.0}, 0.0)
    other = Generation("的的的的的的的的的的的的", 12, False, {1: 1 / 12, 2: None, 3: None}, None)
    lines = side_by_side(["original", "pruned"], [one, other], columns=43).splitlines()
    assert lines[0].split() == ["original", "|", "pruned"] and max(map(width, lines)) <= 43
    assert lines[2].startswith("The cat sees the") and len({width(line.split("|")[0]) for line in lines if "|" in line}) == 1
    assert "12 tokens, cut off" in "\n".join(lines) and "distinct-1: 0.083" in "\n".join(lines)
    assert beside(["a", "b\nc"], 9) == ["a   | b", "    | c"]
