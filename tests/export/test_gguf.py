"""What a GGUF holds, read back with the gguf package; that llama.cpp runs it is shown in tests/consumers."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from LLMPruner.errors import UsageError
from LLMPruner.export.gguf import _interleaved, _rope_factors, check_gguf, write_gguf
from LLMPruner.model.gguf_tokenizer import LLAMA3_SPLIT, pre_tokenizer_name
from LLMPruner.plan import LayerPlan, PruningPlan
from tests.conftest import VOCAB, geometry_of, tiny_config, tiny_model
from tests.export.test_hf import LLAMA3_ROPE, pruned


def read(path) -> tuple[dict, dict]:
    """Fields by name, and tensors by name."""
    reader = GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_heads_and_widths_are_arrays_over_the_layers(tokenizer, tmp_path):
    loaded = pruned(tokenizer, removed=True)
    write_gguf(tmp_path / "m.gguf", loaded)
    fields, _ = read(tmp_path / "m.gguf")
    groups = [count or 1 for count in loaded.plan.kv_counts]
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count_kv"] == groups
    assert fields["deci.attention.head_count"] == [4 * count for count in groups]
    assert fields["deci.feed_forward_length"] == [count or 32 for count in loaded.plan.channel_counts]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 8


def test_a_uniform_plan_is_a_plain_llama(tokenizer, tmp_path):
    geometry = geometry_of(tiny_model())
    plan = PruningPlan(geometry, (LayerPlan((1,), tuple(range(64))),) * geometry.num_layers)
    write_gguf(tmp_path / "m.gguf", pruned(tokenizer, plan))
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 1 and fields["llama.feed_forward_length"] == 64


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2)])
def test_weights_come_back_within_their_precision(kind, error, tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    write_gguf(tmp_path / "m.gguf", loaded, kind)
    _, tensors = read(tmp_path / "m.gguf")
    names = {"token_embd.weight": "model.embed_tokens.weight", "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight"}
    state = loaded.model.state_dict()
    for ours, theirs in names.items():
        found = dequantize(tensors[ours].data, tensors[ours].tensor_type)
        expected = state[theirs].numpy()
        assert found.shape == expected.shape
        assert numpy.abs(found - expected).max() <= error * numpy.abs(expected).max()
    norms = [tensor for name, tensor in tensors.items() if "norm" in name]
    assert len(norms) == 9 and all(tensor.tensor_type.name == "F32" for tensor in norms)


def test_rows_that_are_no_multiple_of_a_block_stay_in_float16(tokenizer, tmp_path):
    loaded = pruned(tokenizer)  # the last layer keeps a single channel
    write_gguf(tmp_path / "m.gguf", loaded, "q8_0")
    _, tensors = read(tmp_path / "m.gguf")
    assert tensors["blk.3.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.3.ffn_gate.weight"].tensor_type.name == "Q8_0"


def test_the_weights_own_precision_is_the_default(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    loaded.model.to(torch.bfloat16)
    write_gguf(tmp_path / "m.gguf", loaded)
    assert read(tmp_path / "m.gguf")[1]["output.weight"].tensor_type.name == "BF16"


def test_interleaving_turns_halves_into_pairs():
    rows = torch.arange(16).unsqueeze(1)  # two heads of eight
    assert _interleaved(rows, 8).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rotary_factors_divide_only_the_low_frequencies():
    factors = _rope_factors(tiny_model(rope_parameters=LLAMA3_ROPE))
    assert factors[0] == 1 and factors[-1] == 8
    assert _rope_factors(tiny_model()) is None


def test_the_tokenizer_goes_along(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    try:
        write_gguf(tmp_path / "m.gguf", loaded)
    finally:
        tokenizer.chat_template = None
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"] == [tokenizer.convert_ids_to_tokens(i) for i in range(VOCAB)]
    assert fields["tokenizer.ggml.merges"]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]


def split(*steps, normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer with these steps before its merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_rules_that_llama_cpp_knows_by_name_are_told_from_others():
    from tokenizers import Regex

    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(split(byte_level)) == "gpt-2"
    assert pre_tokenizer_name(split(pre_tokenizers.Digits(individual_digits=True), byte_level)) == "smollm"
    assert pre_tokenizer_name(split(pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), bare)) == "llama-bpe"
    for other in (
        split(bare),
        split(pre_tokenizers.Digits(individual_digits=False), byte_level),
        split(pre_tokenizers.Split(Regex(r"\s+"), "isolated"), bare),
        split(pre_tokenizers.Metaspace()),
        split(byte_level, normalizer=normalizers.NFC()),
        split(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        split(pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "removed", invert=True), bare),
        split(pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), byte_level),
    ):
        with pytest.raises(UsageError, match="choose the hf or padded export"):
            pre_tokenizer_name(other)


def test_rotary_scaling_without_a_gguf_name_is_refused(tokenizer):
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UsageError, match="rotary scaling 'dynamic'"):
        check_gguf(config.to_dict(), tokenizer, uniform=False)


def test_a_failed_export_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("LLMPruner.export.gguf._encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gguf(tmp_path / "m.gguf", pruned(tokenizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),  # in transformers' older words
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "of their own for some layers"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of each head"),
        ({"model_type": "qwen3"}, "a pruned qwen3, whose layers have norms inside, cannot be written as GGUF"),
    ],
)
def test_what_llama_cpp_could_not_be_told_is_refused_before_the_run(changes, words, tokenizer):
    with pytest.raises(UsageError, match=words):
        check_gguf(changes, tokenizer, uniform=False)


@pytest.mark.parametrize(
    "config",
    [
        {},  # of a GGUF
        {"hidden_act": "swish"},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": LLAMA3_ROPE, "partial_rotary_factor": 1.0},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"]},
        {"model_type": "mistral", "sliding_window": None},
        tiny_config(attention_bias=True, mlp_bias=True).to_dict(),
    ],
)
def test_what_llama_cpp_can_be_told_passes(config, tokenizer):
    check_gguf(config, tokenizer, uniform=False)
    check_gguf({"model_type": "qwen3"}, tokenizer, uniform=True)


def test_where_the_model_comes_from_and_what_was_removed_stands_in_the_file(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    path = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39"
    loaded.provenance |= {"base_model": path, "command": f"python prune.py --base_model {path}"}
    write_gguf(tmp_path / "m.gguf", loaded)
    fields, _ = read(tmp_path / "m.gguf")
    dense, kept = loaded.plan.geometry.dense_params, sum(p.numel() for p in loaded.model.parameters())
    assert fields["general.name"] == "Llama-3.1-8B pruned" and fields["general.basename"] == "Llama-3.1-8B"
    assert (fields["general.type"], fields["general.finetune"]) == ("model", "pruned")
    assert fields["general.base_model.0.organization"] == "meta-llama" and fields["general.base_model.count"] == 1
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/Llama-3.1-8B"
    assert (fields["llmpruner.parameters"], fields["llmpruner.dense_parameters"]) == (kept, dense)
    assert fields["llmpruner.pruning_ratio"] == pytest.approx(1 - kept / dense)
    assert fields["llmpruner.base_model"] == "meta-llama/Llama-3.1-8B"
    assert json.loads(fields["llmpruner.settings"]) == {"repair": "none"}
    assert json.loads(fields["llmpruner.provenance"])["command"] == "python prune.py --base_model 0e9e39"
    assert b"/home/me" not in (tmp_path / "m.gguf").read_bytes()


def test_a_dense_file_is_not_called_pruned(tokenizer, tmp_path):
    loaded = pruned(tokenizer, PruningPlan.dense(geometry_of(tiny_model())))
    loaded.provenance = {"base_model": "models/Llama-3.1-8B"}
    write_gguf(tmp_path / "m.gguf", loaded)
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.name"] == "Llama-3.1-8B" and fields["llmpruner.pruning_ratio"] == 0
    assert not any("pruned" in str(fields[name]) for name in fields if name.startswith(("general.", "llmpruner.")))
    assert not any("base_model.0" in name for name in fields)


def test_a_card_and_a_modelfile_stand_beside(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    loaded.model.generation_config.eos_token_id = [1, 2]
    row = {"corpus": "ptb", "split": "test", "windows": 3, "seq_len": 64, "ppl": 12.345}
    for _ in range(2):  # the second time over its own
        write_gguf(tmp_path / "m.gguf", loaded, measured={"pruned": [row]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "m.gguf", "m.md"]
    assert "| pruned | ptb | test | 3 | 64 | 12.35 |" in (tmp_path / "m.md").read_text()
    stops = [tokenizer.eos_token, tokenizer.convert_ids_to_tokens(2)]
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[1:] == ["FROM ./m.gguf", *(f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop)]


@pytest.mark.parametrize("name", ["Modelfile", "m.md"])
def test_a_strangers_file_beside_stops_the_export_before_anything_is_written(name, tokenizer, tmp_path):
    (tmp_path / name).write_text("FROM llama3")
    with pytest.raises(UsageError, match="was not written by an export"):
        write_gguf(tmp_path / "m.gguf", pruned(tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "FROM llama3"
