"""Configs: every wrong value is refused by the flag that the user typed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from LLMPruner.config import (
    PRESETS,
    CommonConfig,
    EfficiencyConfig,
    EvalConfig,
    ExportConfig,
    PruneConfig,
    require_at_least,
    setting,
)
from LLMPruner.errors import UsageError
from LLMPruner.training_config import FinetuneConfig, LoraConfig

NAN, INF = math.nan, math.inf

WRONG = [
    (PruneConfig, "pruning_ratio", [0, 1, -0.1, 1.5, NAN, INF], "--pruning_ratio"),
    (PruneConfig, "round_to", [0, -64], "--round_to"),
    (PruneConfig, "layer_importance_samples", [0, -1], "--layer_importance_samples"),
    (PruneConfig, "channel_importance_samples", [0, -1], "--channel_importance_samples"),
    (PruneConfig, "layer_importance_seq_len", [1, 0], "--layer_importance_seq_len"),
    (PruneConfig, "calibration_seq_len", [1, 0], "--calibration_seq_len"),
    (PruneConfig, "layer_importance_weight", [-0.1, NAN, INF], "--layer_importance_weight"),
    (PruneConfig, "min_pruning_rate", [-0.1, 0.9, NAN], "--min_pruning_rate"),
    (PruneConfig, "max_pruning_rate", [-0.1, 1.1, NAN], "--max_pruning_rate"),
    (PruneConfig, "freeze_top_n_layers", [-1], "--freeze_top_n_layers"),
    (PruneConfig, "prune_attention", [False], "--no_prune_attention needs --prune_mlp"),
    (PruneConfig, "search_generations", [-1], "--search_generations"),
    (PruneConfig, "search_tokens", [1, 0], "--search_tokens"),
    (PruneConfig, "search_minutes", [0, -1, NAN, INF], "--search_minutes"),
    (PruneConfig, "allow_sublayer_removal", [True], "--allow_sublayer_removal needs --pruning_strategy search"),
    (PruneConfig, "repair_samples", [0], "--repair_samples"),
    (PruneConfig, "self_samples", [-1], "--self_samples"),
    (PruneConfig, "distill_epochs", [-1], "--distill_epochs"),
    (PruneConfig, "distill_model_epochs", [-1], "--distill_model_epochs"),
    (PruneConfig, "distill_last", [-1, 0], "--distill_last"),
    (PruneConfig, "distill_last", [1], "--distill_last needs --distill_model_epochs"),
    (PruneConfig, "distill_labels", [-0.1, 1.1, NAN], "--distill_labels"),
    (CommonConfig, "seed", [-1, 2**32], "--seed"),
    (EfficiencyConfig, "prompt_tokens", [0], "--efficiency_prompt_tokens"),
    (EfficiencyConfig, "new_tokens", [0], "--efficiency_new_tokens"),
    (EfficiencyConfig, "repeats", [0], "--efficiency_repeats"),
    (ExportConfig, "formats", [("hf", "hf")], "named twice"),
    (ExportConfig, "gguf_type", ["q8_0"], "--gguf_type q8_0 needs gguf"),
    (EvalConfig, "datasets", [()], "--eval_datasets"),
    (EvalConfig, "seq_len", [1, 0, -5], "--eval_seq_len"),
    (EvalConfig, "samples", [-1], "--eval_samples"),
    (LoraConfig, "r", [0, -8], "--lora_r"),
    (LoraConfig, "alpha", [0], "--lora_alpha"),
    (LoraConfig, "dropout", [-0.1, 1, NAN], "--lora_dropout"),
    (FinetuneConfig, "method", ["qlora", ""], "--method"),
    (FinetuneConfig, "lr", [0, -1e-4, NAN, INF], "--lr"),
    (FinetuneConfig, "samples", [0], "--samples"),
    (FinetuneConfig, "epochs", [0, -1], "--epochs"),
    (FinetuneConfig, "seq_len", [1], "--seq_len"),
    (FinetuneConfig, "batch_size", [0], "--batch_size"),
    (FinetuneConfig, "grad_accum", [0], "--grad_accum"),
    (FinetuneConfig, "max_grad_norm", [-1, NAN, INF], "--max_grad_norm"),
    (FinetuneConfig, "warmup_steps", [-1], "--warmup_steps"),
    (FinetuneConfig, "weight_decay", [-0.1, NAN, INF], "--weight_decay"),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "flag"), [(kind, name, value, flag) for kind, name, values, flag in WRONG for value in values]
)
def test_a_wrong_value_is_refused_by_its_flag(kind, name, value, flag):
    with pytest.raises(UsageError, match=flag):
        kind(**{name: value})


RIGHT = [
    (PruneConfig, {"pruning_ratio": 0.001, "round_to": 1, "layer_importance_weight": 0, "max_pruning_rate": 0}),
    (PruneConfig, {"pruning_ratio": 0.999, "min_pruning_rate": 0.8, "max_pruning_rate": 0.8, "calibration_seq_len": 2}),
    (PruneConfig, {"prune_attention": False, "prune_mlp": True}),
    (PruneConfig, {"pruning_strategy": "search", "search_tokens": 2, "search_generations": 0}),
    (PruneConfig, {"repair_samples": 1, "self_samples": 0, "distill_epochs": 0}),
    (PruneConfig, {"distill_model_epochs": 1, "distill_last": 1}),
    (CommonConfig, {"seed": 0}),
    (CommonConfig, {"seed": 2**32 - 1}),
    (ExportConfig, {"formats": ("hf", "gguf"), "gguf_type": "q8_0"}),
    (EvalConfig, {"seq_len": 2, "samples": 0}),
    (LoraConfig, {"r": 1, "alpha": 1, "dropout": 0, "target_mlp": False}),
    (FinetuneConfig, {"lr": 1e-9, "max_grad_norm": 0, "warmup_steps": 0, "weight_decay": 0, "seq_len": 2}),
]


@pytest.mark.parametrize(("kind", "values"), RIGHT)
def test_the_outermost_right_values_are_accepted(kind, values):
    assert dataclasses.asdict(kind(**values)).items() >= values.items()


KINDS = [CommonConfig, EfficiencyConfig, EvalConfig, ExportConfig, FinetuneConfig, LoraConfig, PruneConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_frozen_and_its_defaults_are_valid(kind):
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(kind)[0].name, None)


def test_lora_needs_a_target():
    with pytest.raises(UsageError, match="--lora_target_attention"):
        LoraConfig(target_attention=False, target_mlp=False)


def test_a_finetuning_error_spells_the_flag_as_the_script_at_hand_does():
    with pytest.raises(UsageError, match="--finetune_epochs must be 1 or more, got 0"):
        FinetuneConfig(epochs=0, prefix="--finetune_")


def test_the_learning_rate_defaults_to_the_methods_usual_one():
    assert FinetuneConfig(method="lora").learning_rate == 2e-4 and FinetuneConfig(method="full").learning_rate == 1e-5
    assert FinetuneConfig(method="full", lr=3e-3).learning_rate == 3e-3


def test_at_least_includes_the_minimum():
    require_at_least("--x", 2, 2)
    with pytest.raises(UsageError, match="--x must be 2 or more, got 1"):
        require_at_least("--x", 1, 2)


@pytest.mark.parametrize(
    ("start", "end", "layers"), [(0, None, [0, 1, 2, 3]), (1, 3, [1, 2]), (3, None, [3]), (0, 4, [0, 1, 2, 3])]
)
def test_the_layer_range_excludes_its_end(start, end, layers):
    assert list(PruneConfig(layer_start=start, layer_end=end).layer_range(4)) == layers


@pytest.mark.parametrize(("start", "end"), [(4, None), (-1, None), (0, 5), (0, 0), (0, -1), (2, 2), (3, 1)])
def test_a_layer_range_that_is_empty_or_leaves_the_model_is_refused(start, end):
    with pytest.raises(UsageError, match=f"--layer_start {start} --layer_end {4 if end is None else end}"):
        PruneConfig(layer_start=start, layer_end=end).layer_range(4)


def test_a_setting_carries_its_default_and_what_its_flag_says():
    @dataclasses.dataclass(frozen=True)
    class Config:
        plain: int = 1
        said: int = setting(2, "how many", "numbers")
        after: int = setting(3, "how many more")

    plain, said, after = dataclasses.fields(Config)
    assert Config() == Config(1, 2, 3) and not plain.metadata
    assert (said.metadata["help"], said.metadata["group"], after.metadata["group"]) == ("how many", "numbers", None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_setting_says_is_one_line(kind):
    said = [field.metadata["help"] for field in dataclasses.fields(kind) if field.metadata]
    assert len(set(said)) == len(said) and all(text and "\n" not in text and not text.endswith(".") for text in said)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_made_of_settings(preset):
    assert dataclasses.asdict(PruneConfig(**preset)).items() >= preset.items()


@pytest.mark.parametrize(
    ("given", "steps", "expected"), [(None, 50, 5), (None, 9, 0), (None, 10**6, 100), (7, 50, 7), (0, 50, 0)]
)
def test_warming_up_takes_at_most_a_tenth_of_a_training_unless_it_is_given(given, steps, expected):
    assert FinetuneConfig(warmup_steps=given).warmup(steps) == expected


@pytest.mark.parametrize("tokens", [2, 511, 512, 6144, 10**5])
@pytest.mark.parametrize("longest", [2, 128, 512, 4096])
def test_the_searchs_windows_fit_the_model_and_make_up_its_tokens(tokens, longest):
    config = PruneConfig(search_tokens=tokens, calibration_seq_len=longest)
    cut, written = config.search_windows
    assert config.search_seq_len <= min(512, longest) and 0 <= cut - written <= 1
    assert tokens - config.search_seq_len < (cut + written) * config.search_seq_len <= tokens


def test_what_the_search_measures_follows_the_device_unless_it_is_given():
    cpu, gpu = (PruneConfig().sized(device) for device in ("cpu", "cuda"))
    assert gpu.search_tokens == 4 * cpu.search_tokens and gpu.search_generations == 2 * cpu.search_generations
    asked = PruneConfig(search_tokens=100, search_generations=0)
    assert asked.sized("cuda") == asked == asked.sized("cpu")
    sizes = {"search_tokens": cpu.search_tokens, "search_generations": cpu.search_generations}
    assert PruneConfig(repair="none").sized("cpu") == PruneConfig(repair="none", **sizes), "nothing else changes"
    assert (
        PruneConfig().search_seq_len == PruneConfig().sized("cpu").search_seq_len == PruneConfig().sized("cuda").search_seq_len
    )
