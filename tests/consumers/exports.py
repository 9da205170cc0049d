"""Models for the consumers: SmolLM2 pruned to a width of its own in every layer, and a tiny 4:1 model with scaled rotation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SIZES, random_plan
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from LLMPruner.config import ExportConfig, PruneConfig
from LLMPruner.export.writer import write_exports
from LLMPruner.importance.allocation import allocate, keep_best_units
from LLMPruner.importance.budget import make_budget
from LLMPruner.importance.criteria import score_units
from LLMPruner.methods.apply import apply_plan
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import LayerPlan
from tests.export.test_hf import LLAMA3_ROPE, pruned

WIDE = {"hidden_size": 256, "head_dim": 32}  # vLLM has no kernel for smaller heads on a CPU
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Export:
    """A model in memory and the folder of its hf/, padded/ and model.gguf (all float32)."""

    loaded: LoadedModel
    folder: Path


def python_of(consumer: str) -> str:
    """The interpreter of a consumer's own environment, which `make test-consumers` builds; fails where it is missing."""
    path = Path(os.environ.get("CONSUMERS", ROOT / ".consumers"), consumer, "bin", "python")
    assert path.exists(), f"{path} is missing: run `make test-consumers`"
    return str(path)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Export:
    """SmolLM2-135M, 15% removed: KV groups and channels by magnitude, ranked over all layers, so that no two are alike."""
    loaded = load_model(find_model("embedded", "--model_path"), dtype="float32", device="cpu")
    config = PruneConfig(pruning_ratio=0.15, prune_mlp=True, importance="magnitude", pruning_strategy="global", repair="none")
    runner, geometry = LayerRunner.of(loaded.model), loaded.plan.geometry
    units = score_units(runner, geometry, "magnitude", windows=None, seed=0)
    loaded.plan = keep_best_units(geometry, allocate(make_budget(geometry, config), None, config, units), units)
    assert len(set(zip(loaded.plan.kv_counts, loaded.plan.channel_counts, strict=True))) > 3
    apply_plan(runner, loaded.plan)
    return _exported(loaded, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> Export:
    """A tiny 4:1 Llama with Llama-3.1's rotary scaling, one attention and one MLP removed."""
    return _exported(pruned(tokenizer, removed=True, rope_parameters=LLAMA3_ROPE, **WIDE), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def qwen2(tokenizer, tmp_path_factory) -> Export:
    """A tiny Qwen2: biases at q, k and v."""
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES | WIDE))
    return _exported(_pruned_at_random(model, tokenizer, tmp_path_factory.mktemp("dense")), tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def qwen3(tokenizer, tmp_path_factory) -> Export:
    """A tiny Qwen3: norms of each head's queries and keys. Pruned it has no place in a GGUF."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES | WIDE | {"tie_word_embeddings": True}))
    loaded = _pruned_at_random(model, tokenizer, tmp_path_factory.mktemp("dense"))
    return _exported(loaded, tmp_path_factory.mktemp("qwen3"), ("hf", "padded"))


def _pruned_at_random(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> LoadedModel:
    """A stock model, read by our loader and pruned at random; layer 2 has no attention, layer 1 no MLP."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.1) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.1)
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load_model(find_model(str(folder), "--model_path"), dtype="float32", device="cpu")
    plan = random_plan(loaded.plan.geometry, seed=1)
    plan = plan.with_layer(2, LayerPlan((), plan.layers[2].channels)).with_layer(1, LayerPlan(plan.layers[1].kv_groups, ()))
    apply_plan(loaded.runner, plan)
    loaded.plan = plan
    return loaded


@pytest.fixture(params=["smollm2", "tiny", "qwen2", "qwen3"])
def export(request) -> Export:
    """All, one after the other."""
    return request.getfixturevalue(request.param)


@torch.no_grad()
def reference(loaded: LoadedModel, ids: list[int], new_tokens: int = 32) -> tuple[torch.Tensor, list[int]]:
    """Logits `(tokens, vocab)` of our own model, and its greedy continuation, computed without a cache."""
    logits = loaded.model(input_ids=torch.tensor([ids])).logits[0]
    longer = list(ids)
    for _ in range(new_tokens):
        longer.append(int(loaded.model(input_ids=torch.tensor([longer])).logits[0, -1].argmax()))
    return logits, longer[len(ids) :]


def _exported(loaded: LoadedModel, folder: Path, formats: tuple[str, ...] = ("hf", "gguf", "padded")) -> Export:
    write_exports(loaded, ExportConfig(formats), folder, {})
    return Export(loaded, folder)
