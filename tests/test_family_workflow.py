"""The four scripts on every family but Llama, which all other tests use: prune, fine-tune, compare, diagnose, export."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import SIZES
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import diagnose_model
import evaluate_models
import llama3_unbalanced_pruning_gqa_aware as prune
import test_finetuning as finetune
from LLMPruner.model.source import find_model

SMALL = ["--layer_importance_samples=4", "--channel_importance_samples=6", "--calibration_seq_len=64", "--prune_mlp"]
SMALL += ["--layer_importance_seq_len=32", "--dtype=float32", "--device=cpu", "--pruning_ratio=0.3", "--round_to=8"]
BEST = ["--preset=best", "--search_tokens=128", "--repair_samples=8", "--self_samples=2", "--distill_epochs=1"]
FAMILIES = {
    "mistral": MistralForCausalLM(MistralConfig(**SIZES, sliding_window=128)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 12, "tie_word_embeddings": True})),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_from_dense_to_compared(name, tmp_path, data_dir, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FAMILIES[name].save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    common = ["--base_model=dense", f"--data_dir={data_dir}", *SMALL]
    exports = ["hf", "padded"] if name == "qwen3" else ["hf", "padded", "gguf"]
    for label, choices in (("default", []), ("flap", ["--preset=flap"]), ("best", BEST)):
        assert prune.main([*common, *choices, f"--save_ckpt_log_name={label}", "--save_model"]) == 0
        source = find_model(f"prune_log/{label}/pytorch_model.bin", "--model_path")
        assert source.geometry.family == name and source.plan.removed_params >= 0.3 * source.geometry.dense_params
    flags = ["--model_path=prune_log/default/pytorch_model.bin", "--save_name=lora", "--use_lora", f"--data_dir={data_dir}"]
    flags += ["--samples=8", "--epochs=1", "--seq_len=64", "--dtype=float32", "--device=cpu", "--save_model"]
    assert finetune.main([*flags, "--export", *exports]) == 0
    tuned = "prune_log/lora/pytorch_model_finetuned.bin"
    assert diagnose_model.main([f"--model_path={tuned}", "--original_model=dense", "--dtype=float32", "--device=cpu"]) == 0
    models = ["--original_model=dense", "--pruned_model=prune_log/lora/padded", f"--finetuned_model={tuned}"]
    assert evaluate_models.main([*models, f"--data_dir={data_dir}", "--seq_len=64", "--save_results=r.json"]) == 0
    found = json.loads(Path("r.json").read_text())["models"]
    ppl = [result["ppl"] for model in found.values() for result in model["ppl"].values()]
    assert len(ppl) == 3 and all(math.isfinite(value) for value in ppl)
    assert ppl[1] == pytest.approx(ppl[2], rel=1e-4), "the padded export is the fine-tuned model"


def test_a_pruned_qwen3_is_refused_as_gguf_before_the_run(tmp_path, data_dir, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FAMILIES["qwen3"].save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    assert (
        prune.main(["--base_model=dense", f"--data_dir={data_dir}", *SMALL, "--save_ckpt_log_name=x", "--export", "gguf"]) == 2
    )
    assert "a pruned qwen3, whose layers have norms inside, cannot be written as GGUF" in capsys.readouterr().err
    assert not Path("prune_log").exists() or not list(Path("prune_log").iterdir())


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_biases_without_a_place_are_refused_before_the_run(name, tmp_path, data_dir, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FAMILIES[name].save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    flags = ["--base_model=dense", f"--data_dir={data_dir}", *SMALL, "--preset=flap", "--save_ckpt_log_name=x", "--export"]
    assert prune.main([*flags, "hf", "padded"]) == 2
    assert "no stock Qwen" in capsys.readouterr().err and not list(Path("prune_log").glob("*"))
    assert prune.main([*flags, "hf"]) == 0
