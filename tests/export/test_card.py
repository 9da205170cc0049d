"""The model card: what was removed, how it came about, what it scores and how it loads."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from LLMPruner.errors import UsageError
from LLMPruner.evaluator.ppl import Perplexity
from LLMPruner.export.card import MARK, base_name, beside, check_beside, model_card, modelfile, portable
from LLMPruner.export.layout import filled, stock
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan

GEOMETRY = Geometry(300, 64, 96, 4, 8, 2, 8)
PLAN = PruningPlan.dense(GEOMETRY).with_layer(1, LayerPlan((0,), tuple(range(40))))
RECORD = {
    "base_model": "/models/tiny",
    "command": "python prune.py --prune_mlp",
    "calibration": {"corpus": "ptb", "split": "train"},
    "settings": {"importance": "taylor", "pruning_strategy": "search", "repair": "least_squares"},
    "seed": 42,
    "versions": {"torch": "2.0", "python": "3.11"},
}


def card(plan: PruningPlan = PLAN, layout: PruningPlan | None = None, form: str = "own", measured=None, **record) -> str:
    loaded = SimpleNamespace(plan=plan, provenance=RECORD | record)
    return model_card(loaded, layout or filled(plan), measured or {}, form=form)


def test_the_summary_counts_what_was_removed():
    removed = GEOMETRY.dense_params - PLAN.total_params
    text = card()
    assert f"# Pruned Llama, {PLAN.total_params:,} parameters" in text
    assert f"Of {GEOMETRY.dense_params:,} parameters {removed:,} ({removed / GEOMETRY.dense_params:.1%}) were removed" in text
    assert "4 query heads" in text and "zeros" not in text and "bias" not in text
    assert f"Of {10**6:,} parameters" in card(dense_parameters=10**6), "of a uniform export the record knows the dense size"


def test_padding_and_added_biases_are_confessed():
    layout = stock(PLAN)
    padding = layout.total_params - PLAN.total_params
    assert f"{padding:,} zeros" in card(layout=layout, form="stock")
    assert "bias that the dense model has not" in card(replace(PLAN, output_bias=True))


def test_how_it_loads_depends_on_whose_class_it_is():
    assert "trust_remote_code=True" in card() and "--trust-remote-code" in card()
    padded = card(layout=stock(PLAN), form="stock")
    assert "trust" not in padded and "padded to the widest" in padded
    uniform = PruningPlan(GEOMETRY, (LayerPlan((0,), tuple(range(40))),) * 4)
    assert "padded" not in card(uniform, stock(uniform), form="stock")


def test_provenance_is_a_row_for_each_known_fact():
    text = card()
    for row in (
        "| base model | `tiny` |",
        "| calibration | `ptb train` |",
        "| allocation | `search` |",
        "| seed | `42` |",
    ):
        assert row in text
    assert "| versions | `torch 2.0, python 3.11` |" in text
    assert "fine-tuning" not in text and "epochs" not in text
    assert "| fine-tuning | `python tune.py` |" in card(finetune={"command": "python tune.py"})
    assert "None" not in card(base_model=None, settings=None, calibration=None, versions=None)


@pytest.mark.parametrize("measured", [{}, {"pruned": []}])
def test_what_was_not_measured_is_said_to_be_so(measured):
    assert "Not measured by the run that wrote this export." in card(measured=measured)


def test_perplexity_is_a_row_for_each_role_and_corpus():
    measured = {
        "original": [Perplexity("ptb", "test", 64, 3, 189, 12.345).as_dict()],
        "pruned": [Perplexity("ptb", "test", 64, 3, 189, math.inf).as_dict()],
    }
    text = card(measured=measured)
    assert "| original | ptb | test | 3 | 64 | 12.35 |" in text and "| pruned | ptb | test | 3 | 64 | not finite |" in text


def test_the_layers_are_the_models_own_and_not_the_layouts():
    text = card(PLAN.with_layer(2, LayerPlan((), ())), stock(PLAN))
    rows = [line for line in text.splitlines() if line[:3] in ("| 0", "| 1", "| 2", "| 3")]
    assert rows == ["| 0 | 2 | 96 |", "| 1 | 1 | 40 |", "| 2 | removed | removed |", "| 3 | 2 | 96 |"]
    assert "| layer | KV groups of 2 | channels of 96 |" in text


HUB = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659"


@pytest.mark.parametrize(
    ("path", "shown", "name"),
    [
        ("/models/Llama-3.1-8B", "Llama-3.1-8B", "Llama-3.1-8B"),
        ("models/Llama-3.1-8B", "Llama-3.1-8B", "Llama-3.1-8B"),
        ("/x/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        (HUB, "meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
    ],
)
def test_the_base_model_is_a_name_or_a_hub_id_and_never_a_path(path, shown, name):
    assert portable({"base_model": path})["base_model"] == shown
    assert base_name({"base_model": path}) == name
    again = portable(portable({"base_model": path}))
    assert again["base_model"] == shown and base_name(again) == name
    assert (f"base_model: {shown}\n" in card(base_model=path)) == (path == HUB), "the hub's own key names hub models only"
    assert base_name({}) == "model"


def test_no_path_of_this_machine_stands_on_a_card():
    command = "python prune.py --base_model=/home/me/llama --data_dir '/home/me/my data' --seed 1 --save_ckpt_log_name x/y"
    tuning = {"command": "python tune.py --model_path /home/me/m.bin", "base_checkpoint": "/home/me/m.bin"}
    record = {
        "command": command,
        "base_model": HUB,
        "finetune": tuning,
        "settings": {"layer_importance_file": "/home/me/l.json"},
    }
    assert "/home" not in card(**record) and "/home" not in str(portable(RECORD | record))
    expected = "python prune.py --base_model=llama --data_dir 'my data' --seed 1 --save_ckpt_log_name x/y"
    assert portable(record)["command"] == expected
    assert portable({"command": "python 'half /home/me/x"})["command"].endswith(" x")
    assert portable(RECORD | {"n": [1, None, 2.5, True]})["n"] == [1, None, 2.5, True]


def test_what_was_not_pruned_is_not_called_so():
    text = card(PruningPlan.dense(GEOMETRY), form="stock", base_model="/models/tiny", command="python -m LLMPruner.export m")
    assert "pruned" not in text.lower().replace("llmpruner", "") and "0.0%" not in text
    assert "Nothing was removed" in text and f"# Llama, {GEOMETRY.dense_params:,} parameters" in text
    assert "tags: [pruned, structured-pruning]" in card()


def test_the_card_of_a_gguf_says_how_llama_cpp_loads_and_shrinks_it():
    text = card(form="model.gguf")
    assert "llama-cli -m model.gguf" in text and "ollama create NAME -f Modelfile" in text
    assert "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M" in text and "trust" not in text
    assert "library_name: gguf" in text and "library_name: transformers" in card()


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CONVERSATIONS = [
    [("user", 'What is "2 < 3"?')],
    [("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes?"), ("user", "Nothing.")],
]


def chatting(tokenizer, template: str | None, bos: str = "<s>"):
    """The tokenizer with another chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = template, bos
    return tokenizer


def ollamas(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go's template engine makes of the only kind of template that is written (compared once with Go's own)."""
    body, end = re.fullmatch(r"\{\{ range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    condition = r'\{\{ if and \(eq \$i 0\) \(ne \$m\.Role "system"\) \}\}(.*?)\{\{ end \}\}'
    text = ""
    for index, (role, content) in enumerate(messages):
        turn = re.sub(
            condition,
            lambda found, first=index == 0, role=role: found[1] if first and role != "system" else "",
            body,
            flags=re.S,
        )
        assert turn.count("{{") == 2
        text += turn.replace("{{ $m.Role }}", role).replace("{{ $m.Content }}", content)
    return text + end


@pytest.mark.parametrize(
    ("template", "bos", "end"),
    [(CHATML, "<s>", "<|im_end|>"), (SMOLLM2, "<|im_start|>", "<|im_end|>"), (LLAMA3, "<s>", "<|eot_id|>")],
    ids=["ChatML", "SmolLM2", "Llama-3"],
)
def test_ollama_writes_conversations_as_the_tokenizers_own_template_does(template, bos, end, tokenizer):
    own = chatting(tokenizer, template, bos)
    text = modelfile("model.gguf", own, ["</s>"])
    assert text.splitlines()[:2] == [MARK, "FROM ./model.gguf"]
    assert text.endswith(f'PARAMETER stop "</s>"\nPARAMETER stop "{end}"\n')
    written = text.split('TEMPLATE """')[1].split('"""')[0]
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ollamas(written, conversation) == (expected.removeprefix("<s>") if template == LLAMA3 else expected)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages }}",
        "{{ raise_exception('no') }}",
        SMOLLM2.replace("SmolLM", "{{"),
        CHATML.replace("<|im_end|>", " <|im_end|>"),
        CHATML.replace("{% for", "{% if tools %}{{ tools }}{% endif %}{% for", 1),
        LLAMA3.replace("{% for", "{% set today = 'July' %}{% for", 1).replace("| trim", "+ messages[0]['role']"),
        {"default": CHATML, "tools": CHATML},
    ],
)
def test_a_chat_template_that_is_not_known_whole_is_left_to_ollama(template, tokenizer):
    text = modelfile("x.gguf", chatting(tokenizer, template), ["</s>", 'a"b', "a\nb", "</s>"])
    assert text == f'{MARK}\nFROM ./x.gguf\nPARAMETER stop "</s>"\n'


def test_only_what_an_export_wrote_is_replaced(tmp_path, tokenizer):
    gguf = tmp_path / "model.gguf"
    check_beside(gguf)
    notes, recipe = beside(gguf)
    assert (notes.name, recipe.name) == ("model.md", "Modelfile")
    notes.write_text(card(form="model.gguf"))
    recipe.write_text(modelfile("model.gguf", tokenizer, []))
    check_beside(gguf)
    for place in (notes, recipe):
        ours = place.read_text()
        for other in ("FROM llama3", "", ours.replace(MARK, "# mine")):
            place.write_text(other)
            with pytest.raises(UsageError, match=f"{place.name} was not written by an export"):
                check_beside(gguf)
        place.unlink()
        place.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(UsageError, match="was not written by an export"):
            check_beside(gguf)
        place.unlink()
        place.mkdir()
        with pytest.raises(UsageError, match="was not written by an export"):
            check_beside(gguf)
        place.rmdir()
