"""A GGUF is read as transformers and llama.cpp read it, all of it, or refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SIZES, random_windows, stock_model
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.families.gguf import tensor_name
from LLMPruner.model.gguf import dequantized, open_gguf
from LLMPruner.model.load import load_model
from LLMPruner.model.source import find_model, weight_files
from LLMPruner.model.tensors import StoredTensors

FLAG, IDS = "--base_model", random_windows(2, 20)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128, "tie_word_embeddings": True}),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def stock(name: str):
    """A random model of transformers' own."""
    return stock_model(*FAMILIES[name])


def write(path: Path, name: str, *, fields=None, tensors=None, kind="F32", **options) -> Path:
    """The stock model as a GGUF, by the format's own words; `fields` and `tensors` change what is written (None: left out)."""
    model = stock(name)
    config, arch = model.config, name.split()[0]
    rope = config.rope_parameters["rope_theta"]
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if arch == "qwen3" else SIZES["head_dim"],
        "rope.freq_base": float(rope),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    } | (fields or {})
    writer = GGUFWriter(path, arch, **options)
    for key, value in settings.items():
        if value is not None:
            {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)](
                f"{arch}.{key}", value
            )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(chr(index + 33) for index in range(config.vocab_size - 1)), '!"'])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(['! "'])
    values = {tensor_name(key): value for key, value in state(model).items()} | (tensors or {})
    for key, value in values.items():
        if value is None:
            continue
        if arch == "llama" and any(part in key for part in ("attn_q.", "attn_k.")):
            heads = value.shape[0] // 8
            value = value.reshape(heads, 2, 4, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        array, quantized = value.contiguous().numpy(), kind != "F32" and value.ndim == 2 and value.shape[-1] % 32 == 0
        raw = GGMLQuantizationType[kind]
        writer.add_tensor(key, quantize(array, raw) if quantized else array, raw_dtype=raw if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state(model) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {key: value for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}


def loaded(path: Path):
    return load_model(find_model(str(path), FLAG), dtype="float32", device="cpu").model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@each_family
def test_what_was_written_is_read_bit_by_bit_and_as_transformers_reads_it(tmp_path, name):
    model, path = stock(name), write(tmp_path / "model.gguf", name)
    own = loaded(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for key, value in state(model).items():
        assert own.state_dict()[key].equal(value) and theirs.state_dict()[key].equal(value), key
    assert type(own) is type(model) is type(theirs)
    assert logits(own).equal(logits(model)) and logits(own).equal(logits(theirs))


def test_quantized_weights_are_the_library_s_dequantized_ones(tmp_path):
    own = loaded(write(tmp_path / "model.gguf", "qwen2", kind="Q8_0")).state_dict()
    weight = stock("qwen2").state_dict()["model.layers.2.mlp.gate_proj.weight"]
    kind = GGMLQuantizationType.Q8_0
    wanted = dequantize(quantize(weight.numpy(), kind), kind)
    assert numpy.array_equal(own["model.layers.2.mlp.gate_proj.weight"].numpy(), wanted)
    assert not numpy.array_equal(weight.numpy(), wanted)


def known_kinds() -> list[GGMLQuantizationType]:
    """The types of raw blocks that the package dequantizes."""
    known = []
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(numpy.zeros((1, size), dtype=numpy.uint8), kind)
        except NotImplementedError:
            continue
        known.append(kind)
    return [kind for kind in known if kind.name not in ("F32", "F16")]


@pytest.mark.parametrize("kind", known_kinds(), ids=lambda kind: kind.name)
def test_values_are_bit_by_bit_those_of_the_library_for_each_type(kind):
    """Also where the last chunk is shorter than the others, and rows are no multiple of anything."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = numpy.random.default_rng(0).integers(0, 256, (37, 20_480 // block // 3 * size), dtype=numpy.uint8) & 0xBF
    # 0xBF: no scale is infinite, as the bits of a NaN are nobody's promise.
    wanted, found = dequantize(raw, kind), dequantized(raw, kind)
    assert found.dtype == numpy.float32 and found.size > 1 << 17
    assert numpy.array_equal(found.reshape(wanted.shape).view(numpy.uint32), wanted.view(numpy.uint32))


@each_family
def test_one_tensor_is_read_alone_and_in_any_order(tmp_path, name):
    source, wanted = find_model(str(write(tmp_path / "model.gguf", name)), FLAG), state(stock(name))
    model = source.gguf
    assert sorted(model.names(source.plan)) == sorted(wanted) == sorted(found for found, _ in StoredTensors(source).items())
    for key in reversed(model.names(source.plan)):
        assert numpy.array_equal(model.value(key, source.geometry), wanted[key].numpy()), key
    with pytest.raises(KeyError):
        model.value("model.layers.99.mlp.up_proj.weight", source.geometry)


def test_no_more_than_a_tensor_at_a_time_is_in_memory(tmp_path):
    source = find_model(str(write(tmp_path / "model.gguf", "llama", kind="Q8_0")), FLAG)
    sizes = [value.nbytes for _, value in StoredTensors(source).items()]
    tracemalloc.start()
    for _, value in StoredTensors(source).items():
        del value
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * max(sizes) < sum(sizes)


def header(path: Path, arrays: dict[str, list]) -> Path:
    """A GGUF of nothing but these arrays."""
    writer = GGUFWriter(path, "llama")
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


ARRAYS = {
    "x.numbers": [1, -2, 3],
    "x.fractions": [0.5, 2**-40],
    "x.flags": [True, False, True],
    "x.nested": [["a", "bc"], ["d"]],
    "x.one": ["alone"],
    "x.texts": ["", "é", " a b ", "\0", "東京", "x" * 300],
}


def test_arrays_are_read_as_the_library_reads_them(tmp_path):
    for path in (header(tmp_path / "arrays.gguf", ARRAYS), write(tmp_path / "model.gguf", "llama")):
        own, theirs = open_gguf(path).shards[0], GGUFReader(path)
        assert list(own.fields) == list(theirs.fields) and len(own.fields) > len(ARRAYS)
        for name, field in theirs.fields.items():
            found = own.fields[name]
            assert (found.contents(), found.types, found.offset) == (field.contents(), field.types, field.offset), name


@pytest.mark.parametrize("last", [name for name in ARRAYS if name != "x.nested"])
def test_a_file_that_ends_within_an_array_is_damage(tmp_path, last):
    path = header(tmp_path / "whole.gguf", {last: ARRAYS[last]})
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    assert open_gguf(path).fields[last] == ARRAYS[last]
    for length in range(whole.index(last.encode()), len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match="is not a readable GGUF file"):
            open_gguf(cut)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_numbers_in_the_byte_order_of_another_machine_are_refused(tmp_path, kind):
    path = write(tmp_path / "model.gguf", "qwen2", kind=kind, endianess=GGUFEndian.BIG)
    with pytest.raises(DamagedError, match="in the byte order of another machine"):
        find_model(str(path), FLAG)


def test_weights_are_the_models_own_and_not_the_files(tmp_path):
    path = write(tmp_path / "model.gguf", "llama")
    before, model = path.read_bytes(), loaded(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_all_shards_of_a_split_file_are_read(tmp_path):
    whole = loaded(write(tmp_path / "whole.gguf", "llama"))
    write(tmp_path / "parts.gguf", "llama", split_max_tensors=15)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    source = find_model(str(parts[0]), FLAG)
    assert weight_files(source) == parts and logits(loaded(parts[0])).equal(logits(whole))
    with pytest.raises(UsageError, match=f"is one of {len(parts)} parts of a split GGUF: pass the first"):
        find_model(str(parts[1]), FLAG)
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(UsageError, match="pass the first, NAME-00001-of-"):
        find_model(str(renamed), FLAG)
    renamed.rename(parts[0])
    parts[-1].unlink()
    with pytest.raises(DamagedError, match=f"lacks {parts[-1].name} beside it"):
        find_model(str(parts[0]), FLAG)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"blk.2.ffn_up.weight": None}, "lacks weights .*model.layers.2.mlp.up_proj.weight"),
        ({"output_norm.weight": None}, "lacks weights .*model.norm.weight"),
        ({"token_embd.weight": None}, "has no token_embd.weight"),
        ({"blk.4.attn_norm.weight": torch.ones(64)}, "does not describe, blk.4.attn_norm.weight for one"),
        ({"blk.1.ffn_gate_exps.weight": torch.ones(8, 96, 64)}, "does not describe, blk.1.ffn_gate_exps.weight for one"),
        ({"blk.0.attn_q_norm.weight": torch.ones(8)}, "does not describe, blk.0.attn_q_norm.weight for one"),
        ({"blk.0.ffn_up.weight": torch.ones(80, 64)}, r"up_proj.weight has shape \(80, 64\) where its config says \(96, 64\)"),
        ({"blk.1.attn_k.bias": torch.ones(16)}, "does not describe, blk.1.attn_k.bias for one"),
        ({"rope_freqs.weight": torch.ones(4)}, "has scaled rotary frequencies"),
    ],
)
def test_tensors_that_are_missing_or_left_over_are_refused(tmp_path, tensors, complaint):
    with pytest.raises(UsageError, match=complaint):
        find_model(str(write(tmp_path / "model.gguf", "llama", tensors=tensors)), FLAG)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"expert_count": 8}, "is a mixture of experts"),
        ({"rope.scaling.type": "linear"}, "has scaled rotary frequencies"),
        ({"attention.scale": 0.25}, "has llama.attention.scale = 0.25, which cannot be read from a GGUF file here"),
        ({"rope.dimension_count": 4}, "has llama.rope.dimension_count = 4"),
        ({"attention.value_length": 16}, "has llama.attention.value_length = 16"),
        ({"feed_forward_length": [96, 80, 96, 96]}, "differ between layers|not a usable Llama"),
        ({"attention.head_count": [8, 4, 8, 8]}, "its heads and widths differ between layers"),
        ({"block_count": None}, "num_hidden_layers"),
    ],
)
def test_a_setting_that_is_not_understood_is_refused(tmp_path, fields, complaint):
    with pytest.raises(UsageError, match=complaint):
        find_model(str(write(tmp_path / "model.gguf", "llama", fields=fields)), FLAG)


def test_biases_of_a_llama_are_read(tmp_path):
    sizes = {"attn_q": 64, "attn_k": 16, "attn_v": 16, "attn_output": 64}
    biases = {f"blk.{index}.{part}.bias": torch.randn(size) for index in range(4) for part, size in sizes.items()}
    source = find_model(str(write(tmp_path / "model.gguf", "llama", tensors=biases)), FLAG)
    assert source.geometry.attention_bias and not source.geometry.mlp_bias
    model = load_model(source, dtype="float32", device="cpu").model
    assert model.state_dict()["model.layers.3.self_attn.v_proj.bias"].equal(biases["blk.3.attn_v.bias"])


def test_shards_of_another_model_are_damage(tmp_path):
    write(tmp_path / "parts.gguf", "llama", split_max_tensors=15)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(DamagedError, match=f"is not part 2 of {len(parts)} of the split model"):
        find_model(str(parts[0]), FLAG)
    parts[1].write_bytes(write(tmp_path / "whole.gguf", "llama").read_bytes())
    with pytest.raises(DamagedError, match="is not part 2"):
        find_model(str(parts[0]), FLAG)
    parts[1].write_bytes(second)
    assert find_model(str(parts[0]), FLAG).plan.is_dense


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "context_length"])
@pytest.mark.parametrize("value", [None, 0])
def test_what_llama_cpp_needs_is_needed_here(tmp_path, key, value):
    with pytest.raises(DamagedError, match=f"has no usable llama.{key}"):
        find_model(str(write(tmp_path / "model.gguf", "llama", fields={key: value})), FLAG)


def test_sizes_listed_for_each_layer_are_read_where_all_are_alike(tmp_path):
    path = write(tmp_path / "model.gguf", "llama", fields={"feed_forward_length": [96] * 4, "attention.head_count": [8] * 4})
    assert logits(loaded(path)).equal(logits(stock("llama")))
