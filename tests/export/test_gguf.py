"""What a GGUF holds, read back with the gguf package; that llama.cpp runs it is shown in tests/consumers."""

from __future__ import annotations

import numpy
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from LLMPruner.errors import UsageError
from LLMPruner.export.gguf import LLAMA3_SPLIT, _interleaved, _pre_tokenizer, _rope_factors, check_gguf, write_gguf
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
    assert _pre_tokenizer(split(byte_level)) == "gpt-2"
    assert _pre_tokenizer(split(pre_tokenizers.Digits(individual_digits=True), byte_level)) == "smollm"
    assert _pre_tokenizer(split(pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), bare)) == "llama-bpe"
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
            _pre_tokenizer(other)


def test_rotary_scaling_without_a_gguf_name_is_refused(tokenizer):
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UsageError, match="rotary scaling 'dynamic'"):
        check_gguf(config.to_dict(), tokenizer)


def test_a_failed_export_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("LLMPruner.export.gguf._encoded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gguf(tmp_path / "m.gguf", pruned(tokenizer))
    assert not list(tmp_path.iterdir())
