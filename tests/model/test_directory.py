"""A directory is read as stock transformers reads it, or refused by one sentence before any weight is read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import SIZES, random_windows, stock_model, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from LLMPruner.errors import DamagedError, UsageError
from LLMPruner.model.load import load_model
from LLMPruner.model.source import check_seq_len, find_model
from LLMPruner.plan import Geometry
from tests.export.test_hf import LLAMA3_ROPE

FLAG, IDS = "--base_model", random_windows(2, 20)
WIDE = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}  # heads that do not divide the width, 64
STOCK = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama 3 scaling": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE},
    ),
    "llama gelu": (LlamaForCausalLM, LlamaConfig, {"hidden_act": "gelu"}),
    "mistral nemo": (MistralForCausalLM, MistralConfig, {**WIDE, "sliding_window": None}),
    "mistral 0.1": (MistralForCausalLM, MistralConfig, {"sliding_window": 32}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 tied, window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12}),
    "qwen3 tied, biases": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "attention_bias": True}),
}
each_stock_model = pytest.mark.parametrize(("model_class", "config_class", "changes"), STOCK.values(), ids=STOCK)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(folder: Path):
    return load_model(find_model(str(folder), FLAG), dtype="float32", device="cpu")


def with_tensors(folder: Path, change) -> Path:
    """The directory with its tensors as `change` returns them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def with_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@each_stock_model
def test_the_logits_are_those_of_stock_transformers_bit_by_bit(model_class, config_class, changes, tmp_path, tokenizer):
    model = stock_model(model_class, config_class, changes)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own = loaded(tmp_path)
    assert type(own.model) is model_class and logits(own.model).equal(logits(model))
    assert own.store.geometry == own.plan.geometry and own.plan.geometry.family == model.config.model_type
    windows = own.runner.layers(own.runner.embed(IDS))
    with torch.no_grad():
        torch.testing.assert_close(own.store.head(own.store.final_norm(windows)), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_a_config_leaves_out_is_what_transformers_takes(config_class):
    least = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    least |= {"num_attention_heads": 32, "model_type": config_class.model_type}
    least["hidden_size"] = 32 * 8
    whole = config_class(**{name: value for name, value in least.items() if name != "model_type"}).to_dict()
    assert Geometry.from_config(least) == Geometry.from_config(whole)


@pytest.mark.parametrize("name", ["mistral 0.1", "qwen2 tied, window"])
def test_windows_reach_as_far_as_the_sliding_window(name, tmp_path, tokenizer):
    model_class, config_class, changes = STOCK[name]
    stock_model(model_class, config_class, changes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source, window = find_model(str(tmp_path), FLAG), changes["sliding_window"]
    assert source.geometry.max_positions == window
    with pytest.raises(UsageError, match=f"longer than the model's {window} positions"):
        check_seq_len(source, "--seq_len", window + 1)
    config = loaded(tmp_path).model.config
    assert config.sliding_window is None and config.max_position_embeddings == window, "nothing of it is left to an export"


def test_a_window_under_scaled_rotary_frequencies_is_refused(model_dir):
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    folder = with_config(model_dir(), model_type="mistral", sliding_window=32, rope_parameters=scaled)
    with pytest.raises(UsageError, match="in a sliding window and scales its rotary frequencies"):
        loaded(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.k_proj.bias", (16,)),
        ("model.layers.1.self_attn.q_norm.weight", (8,)),
        ("model.layers.4.mlp.up_proj.weight", (96, 64)),
        ("model.layers.2.block_sparse_moe.gate.weight", (8, 64)),
    ],
)
def test_a_tensor_that_the_config_does_not_describe_is_refused(model_dir, name, shape):
    folder = with_tensors(model_dir(), lambda tensors: tensors | {name: torch.ones(shape)})
    with pytest.raises(DamagedError, match=f"weights that its config does not describe, {name} for one"):
        find_model(str(folder), FLAG)
    assert find_model(str(folder), FLAG, faulty=True).plan.is_dense


def test_old_rotary_tables_are_no_weights(model_dir):
    extra = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(4)}
    folder = with_tensors(model_dir(), lambda tensors: tensors | extra)
    assert logits(loaded(folder).model).equal(logits(tiny_model()))


def test_a_tensor_of_another_shape_is_refused(model_dir):
    folder = with_config(model_dir(), intermediate_size=80)
    with pytest.raises(DamagedError, match=r"gate_proj.weight has shape \(96, 64\) where its config says \(80, 64\)"):
        find_model(str(folder), FLAG)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_is_kept_whatever_the_config_ties(model_dir, caplog, family, own):
    def with_head(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        return tensors | {"lm_head.weight": 2 * embedding if own else embedding.clone()}

    kind = {} if family == "llama" else {"model_type": "mistral", "sliding_window": None}
    folder = with_config(with_tensors(model_dir(tie_word_embeddings=True), with_head), **kind)
    result = loaded(folder)
    factor = 2 if own else 1
    torch.testing.assert_close(logits(result.model), factor * logits(tiny_model(tie_word_embeddings=True)))
    assert result.plan.geometry.tied_embeddings == result.model.config.tie_word_embeddings == (not own)
    assert ("a head of its own, which is kept" in caplog.text) == own


def test_heads_that_do_not_divide_the_width_are_read(tmp_path, tokenizer):
    """transformers refuses such a LlamaConfig; without a sliding window a Mistral is the same function."""
    model = stock_model(MistralForCausalLM, MistralConfig, {**WIDE, "sliding_window": None})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = loaded(with_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"]))
    assert isinstance(result.model, LlamaForCausalLM) and logits(result.model).equal(logits(model))


@pytest.mark.parametrize("token", [300, -1, 10**6])
def test_a_padding_token_out_of_range_is_none(model_dir, token):
    model = loaded(with_config(model_dir(), pad_token_id=token)).model
    assert model.config.pad_token_id is None and logits(model).equal(logits(tiny_model()))


def test_an_adapter_is_told_to_be_merged_and_beside_whole_weights_is_nothing(model_dir, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="is a PEFT adapter, not a model: merge it into its base model first"):
        find_model(str(adapter), FLAG)
    folder = model_dir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert logits(loaded(folder).model).equal(logits(tiny_model()))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="is a PEFT adapter, not a model"):
        find_model(str(folder), FLAG)


def test_other_weight_files_beside_the_indexed_ones_do_not_count(model_dir):
    folder = model_dir()
    tensors, index = load_file(folder / "model.safetensors"), {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors").write_bytes(b"an old one")
    assert logits(loaded(folder).model).equal(logits(tiny_model()))


@pytest.mark.parametrize("content", [b"", b"\x10", b"\x02" + bytes(7) + b"{}", b"\x10" + bytes(7) + b"{" * 16, b"\xff" * 40])
def test_a_broken_weight_file_is_damage(model_dir, content):
    folder = model_dir()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match="damaged|lacks weights"):
        find_model(str(folder), FLAG)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rms_norm_eps": "small"}, "has rms_norm_eps = 'small' in its config: it must be a positive number"),
        ({"rms_norm_eps": None}, "has rms_norm_eps = None"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps = nan"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "has rope_theta = None"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "transformers does not take the config of"),
        ({"rope_parameters": [1]}, "transformers does not take the config of"),
        ({"pad_token_id": "1"}, "transformers does not take the config of"),
        ({"bos_token_id": [0]}, "transformers does not take the config of"),
        ({"hidden_act": "foo"}, "transformers does not take the config of"),
        ({"attention_bias": 0}, "transformers does not take the config of"),
        ({"max_position_embeddings": "many"}, "max_position|not a usable|transformers does not take"),
        ({"tie_word_embeddings": "false"}, "has tie_word_embeddings = 'false', which is no bool"),
        ({"layer_types": [["a"]]}, r"layers of the kind \['a'\]"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"transformers_weights": "other.safetensors"}, "names other weight files"),
    ],
)
def test_a_config_that_is_none_is_one_sentence_before_weights_are_read(model_dir, changes, complaint, monkeypatch):
    monkeypatch.setattr("LLMPruner.model.load.StoredTensors", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=complaint) as error:
        loaded(with_config(model_dir(), **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "1"])
def test_generation_settings_that_are_none_are_one_sentence(model_dir, content):
    folder = model_dir()
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UsageError, match="transformers does not take the config of"):
        loaded(folder)


def test_a_key_of_our_exports_means_nothing_in_a_strangers_config(model_dir):
    folder = with_config(model_dir(), removed_attention=[1], removed_mlp=[2])
    assert logits(loaded(folder).model).equal(logits(tiny_model()))


def test_weights_under_other_names_are_told_how_to_be_saved(model_dir):
    folder = with_tensors(model_dir(), lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    with pytest.raises(DamagedError, match="names its weights otherwise .* load it in transformers as LlamaForCausalLM"):
        find_model(str(folder), FLAG)


@pytest.mark.parametrize("weight_map", [{}, {"a": 5}, {"a": None}])
def test_an_index_without_names_is_damage(model_dir, weight_map):
    folder = model_dir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DamagedError, match="is damaged"):
        find_model(str(folder), FLAG)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_of_a_quantized_type_are_refused(model_dir, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = with_tensors(model_dir(), lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(UsageError, match=f"stores {name} as .*: pass the model in full precision"):
        find_model(str(folder), FLAG)


def test_what_lies_beside_the_weights_and_is_not_read_is_told(model_dir, caplog):
    folder = model_dir()
    (folder / "adapter_config.json").write_text("{}")
    find_model(str(folder), FLAG)
    assert "a PEFT adapter beside its weights, which is not applied" in caplog.text


def test_a_config_of_many_layers_is_refused_at_once(model_dir):
    folder, start = with_config(model_dir(), num_hidden_layers=20_000), time.monotonic()
    with pytest.raises(DamagedError, match="lacks weights"):
        find_model(str(folder), FLAG)
    assert time.monotonic() - start < 20
