"""Exported directories are the same function, in transformers' hands and in ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

import LLMPruner.export  # noqa: F401  registers the pruned class
from LLMPruner.errors import UsageError
from LLMPruner.evaluator.health import diagnose_weights
from LLMPruner.export.hf import _write_shards, write_hf, write_padded
from LLMPruner.export.layout import filled, is_uniform, stock
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan, expected_shapes
from tests.conftest import each_architecture, geometry_of, random_plan, random_windows, tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def pruned(tokenizer, plan=None, *, repair: str = "none", removed: bool = False, **changes) -> LoadedModel:
    """A tiny pruned model; the given or a random plan, with whole sublayers removed where asked."""
    model = tiny_model(**changes)
    plan = plan or random_plan(geometry_of(model))
    if removed:
        plan = plan.with_layer(1, LayerPlan((), plan.layers[1].channels)).with_layer(2, LayerPlan(plan.layers[2].kv_groups, ()))
    if repair == "bias":
        plan = replace(plan, output_bias=True)
    apply_plan(LayerRunner.of(model), plan, repair=repair, windows=random_windows())
    record = {"base_model": "tiny", "dense_parameters": plan.geometry.dense_params, "parameters": plan.total_params}
    return LoadedModel(model, tokenizer, plan, record | {"settings": {"repair": repair}})


def logits(model, ids=None) -> torch.Tensor:
    """Of a fixed batch of tokens."""
    with torch.no_grad():
        return model(input_ids=random_windows(3, 20) if ids is None else ids).logits


@each_architecture
@pytest.mark.parametrize("removed", [False, True], ids=["", "removed"])
@pytest.mark.parametrize("repair", ["none", "bias"])
def test_an_export_reloads_bit_identical(changes, repair, removed, tokenizer, tmp_path):
    loaded = pruned(tokenizer, repair=repair, removed=removed, **changes)
    write_hf(tmp_path / "hf", loaded, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again).__name__ == "PrunedLlamaForCausalLM"
    assert logits(again).equal(logits(loaded.model))
    for index, layer in enumerate(again.model.layers):
        groups = loaded.plan.kv_counts[index] or 1
        assert layer.self_attn.k_proj.out_features == groups * loaded.plan.geometry.head_dim


@each_architecture
@pytest.mark.parametrize("removed", [False, True], ids=["", "removed"])
@pytest.mark.parametrize("repair", ["none", "bias"])
def test_a_padded_export_is_a_stock_model_of_the_same_function(changes, repair, removed, tokenizer, tmp_path):
    loaded = pruned(tokenizer, repair=repair, removed=removed, **changes)
    write_padded(tmp_path / "padded", loaded, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert type(again) in (LlamaForCausalLM, MistralForCausalLM)
    assert torch.allclose(logits(again), logits(loaded.model), atol=1e-5)


@pytest.mark.parametrize("removed", [False, True], ids=["", "removed"])
@pytest.mark.parametrize("write", [write_hf, write_padded])
def test_our_own_loader_reads_exports_and_drops_the_padding_of_removed_sublayers(write, removed, tokenizer, tmp_path):
    loaded = pruned(tokenizer, repair="bias", removed=removed)
    write(tmp_path / "x", loaded, {})
    source = find_model(str(tmp_path / "x"), "--model_path")
    again = load_model(source, dtype="float32", device="cpu")
    assert torch.allclose(logits(again.model), logits(loaded.model), atol=1e-5)
    assert again.provenance["settings"] == loaded.provenance["settings"] and again.provenance["measured"] == {}
    assert diagnose_weights(source).healthy and source.is_pruned
    if write is write_hf:
        assert again.plan == loaded.plan and again.plan.total_params == loaded.plan.total_params
    assert (0 in again.plan.kv_counts) == removed


def test_without_the_plan_file_the_sizes_come_from_the_config(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    write_hf(tmp_path / "x", loaded, {})
    (tmp_path / "x" / "pruning_plan.json").unlink()
    source = find_model(str(tmp_path / "x"), "--model_path")
    assert source.plan.kv_counts == loaded.plan.kv_counts and source.plan.channel_counts == loaded.plan.channel_counts
    assert logits(load_model(source, dtype="float32", device="cpu").model).equal(logits(loaded.model))


@pytest.mark.parametrize(
    ("groups", "changes", "kind"),
    [
        (1, {}, LlamaForCausalLM),
        (3, {"num_key_value_heads": 8}, MistralForCausalLM),  # 3 heads do not divide the width of 64
    ],
)
def test_a_uniform_plan_is_a_stock_model_without_custom_code(groups, changes, kind, tokenizer, tmp_path):
    geometry = geometry_of(tiny_model(**changes))
    layer = LayerPlan(tuple(range(groups)), tuple(range(0, 96, 2)))
    loaded = pruned(tokenizer, PruningPlan(geometry, (layer,) * geometry.num_layers), **changes)
    assert is_uniform(loaded.plan)
    write_hf(tmp_path / "x", loaded, {})
    assert not list((tmp_path / "x").glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert type(again) is kind
    assert logits(again).equal(logits(loaded.model))
    assert stock(loaded.plan).total_params == loaded.plan.total_params == sum(p.numel() for p in again.parameters())
    source = find_model(str(tmp_path / "x"), "--model_path")
    ours = load_model(source, dtype="float32", device="cpu")
    assert logits(ours.model).equal(logits(loaded.model)) and diagnose_weights(source).healthy
    save_model(tmp_path / "m.bin", ours)
    again = load_model(find_model(str(tmp_path / "m.bin"), "--model_path"), dtype="float32", device="cpu")
    assert logits(again.model).equal(logits(loaded.model))


def test_a_uniform_plan_with_added_biases_keeps_its_own_class(tokenizer, tmp_path):
    geometry = geometry_of(tiny_model())
    plan = PruningPlan(geometry, (LayerPlan((1,), tuple(range(64))),) * geometry.num_layers)
    loaded = pruned(tokenizer, plan, repair="bias")
    write_hf(tmp_path / "x", loaded, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert type(again).__name__ == "PrunedLlamaForCausalLM" and logits(again).equal(logits(loaded.model))
    assert sum(p.numel() for p in again.parameters()) == loaded.plan.total_params


def test_generation_cached_and_padded_left_is_the_same(tokenizer, tmp_path):
    loaded = pruned(tokenizer, rope_parameters=LLAMA3_ROPE)
    write_hf(tmp_path / "x", loaded, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    ids = random_windows(2, 9)
    ids[0, :4] = 1
    mask = (ids != 1).long()
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 299, "pad_token_id": 1}
    ours = loaded.model.generate(ids, **settings)
    assert again.generate(ids, **settings).equal(ours)
    assert again.generate(ids, use_cache=False, **settings).equal(ours)
    alone = again.generate(ids[:1, 4:], **settings | {"attention_mask": mask[:1, 4:]})
    assert alone[0, 5:].equal(ours[0, 9:])


def test_the_config_speaks_to_transformers_4_and_5(tokenizer, tmp_path):
    loaded = pruned(tokenizer, rope_parameters=LLAMA3_ROPE)
    write_hf(tmp_path / "x", loaded, {})
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3_ROPE
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["num_key_value_heads"] == 2 and config["dtype"] == config["torch_dtype"] == "float32"


def test_the_directory_is_complete_and_its_card_says_what_it_is(tokenizer, tmp_path):
    loaded = pruned(tokenizer, removed=True)
    tokenizer.chat_template = "{{ messages }}"
    row = {"corpus": "ptb", "split": "test", "windows": 3, "seq_len": 64, "ppl": 12.345}
    try:
        write_hf(tmp_path / "x", loaded, {"pruned": [row]})
    finally:
        tokenizer.chat_template = None
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} < names
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template == "{{ messages }}"
    assert len({path.stat().st_mode for path in (tmp_path / "x").iterdir()}) == 1
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| pruned | ptb | test | 3 | 64 | 12.35 |" in card
    zeros = filled(loaded.plan).total_params - loaded.plan.total_params
    assert zeros > 0 and f"{zeros:,} zeros" in card
    assert card.count("| removed |") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("write", [write_hf, write_padded])
def test_the_tokenizer_names_what_the_model_takes_and_no_place_of_this_machine(write, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "own")
    loaded = pruned(AutoTokenizer.from_pretrained(tmp_path / "own"))
    loaded.provenance |= {"base_model": str(tmp_path / "own"), "command": f"python prune.py --base_model={tmp_path}/own"}
    write(tmp_path / "x", loaded, {})
    settings = json.loads((tmp_path / "x" / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only", "name_or_path"} & settings.keys()
    for file in (tmp_path / "x").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} names a place of this machine"
    again = AutoTokenizer.from_pretrained(tmp_path / "x")
    text = "The cat sees the king"
    assert dict(again(text)) == {"input_ids": tokenizer(text).input_ids, "attention_mask": tokenizer(text).attention_mask}
    assert again.eos_token_id == tokenizer.eos_token_id


def test_shards_and_their_index_hold_every_tensor(tokenizer, tmp_path):
    loaded = pruned(tokenizer, removed=True)
    layout = filled(loaded.plan)
    write_hf(tmp_path / "x", loaded, {})
    whole = load_file(tmp_path / "x" / "model.safetensors")
    (tmp_path / "x" / "model.safetensors").unlink()
    _write_shards(tmp_path / "x", loaded, layout, limit=100_000)
    shards = {path.name: load_file(path) for path in (tmp_path / "x").glob("model-*-of-*.safetensors")}
    assert len(shards) > 1 and not (tmp_path / "x" / "model.safetensors").exists()
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == 4 * layout.total_params
    assert index["weight_map"].keys() == whole.keys() == expected_shapes(layout).keys()
    assert all(shards[file][name].equal(whole[name]) for name, file in index["weight_map"].items())
    for tensors in shards.values():  # a tensor that is larger alone has a shard of its own
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= 100_000
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x")).equal(logits(loaded.model))


def test_an_export_replaces_an_older_one_whole(tokenizer, tmp_path):
    write_hf(tmp_path / "x", pruned(tokenizer), {})
    (tmp_path / "x" / "old").write_text("")
    loaded = pruned(tokenizer, seed=3)
    write_hf(tmp_path / "x", loaded, {})
    assert not (tmp_path / "x" / "old").exists()
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x")).equal(logits(loaded.model))


def test_what_fails_half_way_leaves_the_older_export(tokenizer, tmp_path, monkeypatch):
    write_hf(tmp_path / "x", pruned(tokenizer), {})
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    monkeypatch.setattr("LLMPruner.export.hf.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_hf(tmp_path / "x", pruned(tokenizer, seed=3), {})
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_interrupt_between_the_two_renames_leaves_the_older_export(tokenizer, tmp_path, monkeypatch):
    write_hf(tmp_path / "x", pruned(tokenizer), {})
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(self, target):
        if self.name.endswith(".tmp") and Path(target).name == "x":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_hf(tmp_path / "x", pruned(tokenizer, seed=3), {})
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_sampling_settings_beside_greedy_decoding_and_several_chat_templates_are_written(tokenizer, tmp_path):
    loaded = pruned(tokenizer)
    loaded.model.generation_config.temperature = 0.6
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    try:
        write_hf(tmp_path / "x", loaded, {})
    finally:
        tokenizer.chat_template = None
    assert json.loads((tmp_path / "x" / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template["tools"] == "{{ tools }}"


@pytest.mark.parametrize("text", ["[]", "{", '{"settings": 3}'])
def test_a_broken_record_is_one_sentence(text, tokenizer, tmp_path):
    write_hf(tmp_path / "x", pruned(tokenizer), {})
    (tmp_path / "x" / "provenance.json").write_text(text)
    with pytest.raises(UsageError, match=r"provenance.json is not"):
        find_model(str(tmp_path / "x"), "--model_path")


def test_a_fresh_process_without_this_repository_loads_it(tokenizer, tmp_path):
    loaded = pruned(tokenizer, removed=True, repair="bias")
    write_hf(tmp_path / "x", loaded, {})
    torch.save(logits(loaded.model), tmp_path / "expected.pt")
    torch.save(random_windows(3, 20), tmp_path / "ids.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("x", trust_remote_code=True)
assert "LLMPruner" not in sys.modules
assert model(input_ids=torch.load("ids.pt")).logits.equal(torch.load("expected.pt"))
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
