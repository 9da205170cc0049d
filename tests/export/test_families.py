"""Every family and geometry, pruned: the `.bin`, the hf export and the padded one are the same model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import random_plan, random_windows, stock_model
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from LLMPruner.config import ExportConfig
from LLMPruner.errors import UsageError
from LLMPruner.export.writer import write_exports
from LLMPruner.families.llama import MISTRAL
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.load import LoadedModel, load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan, PruningPlan

IDS = random_windows(2, 20)
QWEN3 = (Qwen3ForCausalLM, Qwen3Config)
QWEN2 = (Qwen2ForCausalLM, Qwen2Config)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, one KV head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "mistral nemo": (MistralForCausalLM, MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "mistral 0.1": (MistralForCausalLM, MistralConfig, {"sliding_window": 32}),
    "qwen2": (*QWEN2, {}),
    "qwen2, MHA, tied": (*QWEN2, {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    "qwen3": (*QWEN3, {"head_dim": 12}),
    "qwen3, 8:1, biases, tied": (*QWEN3, {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def pruned(request, tmp_path, tokenizer) -> LoadedModel:
    """A stock model of the kind, loaded and pruned at random; layer 2 has no attention."""
    stock_model(*request.param).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    loaded = load_model(find_model(str(tmp_path / "dense"), "--base_model"), dtype="float32", device="cpu")
    plan = random_plan(loaded.plan.geometry, seed=1)
    loaded.plan = plan.with_layer(2, LayerPlan((), plan.layers[2].channels))
    apply_plan(loaded.runner, loaded.plan)
    return loaded


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def generated(model, **options) -> torch.Tensor:  # greedy
    return model.generate(
        IDS[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )


def test_the_bin_and_all_exports_are_the_same_model(pruned, tmp_path):
    wanted = logits(pruned.model)
    save_model(tmp_path / "m.bin", pruned)
    again = load_model(find_model(str(tmp_path / "m.bin"), "--model_path"), dtype="float32", device="cpu")
    assert logits(again.model).equal(wanted) and again.plan == pruned.plan and type(again.model) is type(pruned.model)
    write_exports(pruned, ExportConfig(("hf", "padded")), tmp_path / "out", {})
    family = pruned.plan.geometry.table
    for form, kind in (("hf", family.pruned_type), ("padded", family.model_type)):
        folder = tmp_path / "out" / form
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] in (kind, "llama" if family == MISTRAL else kind) and config.get("sliding_window") is None
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        assert type(theirs).__name__ == config["architectures"][0]
        torch.testing.assert_close(logits(theirs), wanted, atol=2e-5, rtol=1e-4)
        assert generated(theirs).equal(generated(theirs, use_cache=False)) and generated(theirs).equal(generated(pruned.model))
        ours = load_model(find_model(str(folder), "--model_path"), dtype="float32", device="cpu")
        torch.testing.assert_close(logits(ours.model), wanted, atol=2e-5, rtol=1e-4)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", trust_remote_code=True, dtype=torch.float32)
    assert logits(reloaded.eval()).equal(logits(ours_of(tmp_path))), "the hf export is bit by bit what we load from it"


def ours_of(tmp_path):
    return load_model(find_model(str(tmp_path / "out" / "hf"), "--model_path"), dtype="float32", device="cpu").model


def test_biases_of_a_repair_go_out_or_are_refused(pruned, tmp_path):
    windows = random_windows(8, 16, seed=3)
    dense = load_model(find_model(str(tmp_path / "dense"), "--base_model"), dtype="float32", device="cpu")
    plan = PruningPlan(pruned.plan.geometry, pruned.plan.layers, output_bias=True)
    apply_plan(dense.runner, plan, repair="bias", windows=windows)
    dense.plan = plan
    write_exports(dense, ExportConfig(("hf",)), tmp_path / "out", {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(dense.model), atol=2e-5, rtol=1e-4)
    if plan.geometry.family in ("qwen2", "qwen3"):
        with pytest.raises(UsageError, match="no stock Qwen. has a place for the biases"):
            write_exports(dense, ExportConfig(("padded",)), tmp_path / "out", {})


@pytest.mark.parametrize("kind", ["llama", "mistral nemo", "qwen2", "qwen3"])
def test_a_model_whose_layers_are_alike_is_read_back_from_gguf(kind, tmp_path, tokenizer):
    stock_model(*KINDS[kind]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path), "--base_model"), dtype="float32", device="cpu")
    uniform = PruningPlan(loaded.plan.geometry, tuple(LayerPlan((0, 1), tuple(range(8, 48))) for _ in range(4)))
    apply_plan(loaded.runner, uniform)
    loaded.plan = uniform
    write_exports(loaded, ExportConfig(("gguf",)), tmp_path / "out", {})
    again = load_model(find_model(str(tmp_path / "out" / "model.gguf"), "--base_model"), dtype="float32", device="cpu")
    torch.testing.assert_close(logits(again.model), logits(loaded.model), atol=1e-6, rtol=1e-5)
    assert again.tokenizer("The cat").input_ids == loaded.tokenizer("The cat").input_ids


def test_a_uniform_qwen2_with_fewer_heads_is_its_own_size_everywhere(tmp_path, tokenizer):
    """Loaders, llama.cpp among them, take a stock Qwen2's heads to fill its width."""
    stock_model(*KINDS["qwen2"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path), "--base_model"), dtype="float32", device="cpu")
    loaded.plan = PruningPlan(loaded.plan.geometry, tuple(LayerPlan((1,), tuple(range(48))) for _ in range(4)))
    apply_plan(loaded.runner, loaded.plan)
    write_exports(loaded, ExportConfig(("hf", "gguf")), tmp_path / "out", {})
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["model_type"] == "pruned_qwen2"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    assert logits(theirs).equal(logits(loaded.model)) and theirs.num_parameters() == loaded.plan.total_params
    architecture = GGUFReader(tmp_path / "out" / "model.gguf").fields["general.architecture"].contents()
    assert architecture == "deci"


def test_a_pruned_qwen3_has_no_gguf(tmp_path, tokenizer):
    stock_model(*KINDS["qwen3"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(find_model(str(tmp_path), "--base_model"), dtype="float32", device="cpu")
    loaded.plan = random_plan(loaded.plan.geometry, seed=1)
    apply_plan(loaded.runner, loaded.plan)
    with pytest.raises(UsageError, match="a pruned qwen3, whose layers have norms inside, cannot be written as GGUF"):
        write_exports(loaded, ExportConfig(("gguf",)), tmp_path / "out", {})
