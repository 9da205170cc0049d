"""The forecast: its FLOPs are those that are computed, its bytes and reads those of a streamed model, and no weight is read."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SIZES, geometry_of, random_windows, stock_model, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from LLMPruner import cost
from LLMPruner.config import PruneConfig
from LLMPruner.evaluator import ppl
from LLMPruner.importance import criteria, layer_analyzer
from LLMPruner.importance.budget import make_budget
from LLMPruner.methods import apply, block_distill, healing_cost
from LLMPruner.model import head, hidden
from LLMPruner.model.fit import Streaming
from LLMPruner.model.load import load_model
from LLMPruner.model.source import ModelSource, find_model
from LLMPruner.model.streamed import StreamedStore
from LLMPruner.plan import Geometry, LayerPlan, PruningPlan
from LLMPruner.stages.forecast import Forecast, Machine, forecast, log_comparison
from LLMPruner.stages.job import PruneJob
from LLMPruner.training_config import FinetuneConfig

ROOT = Path(__file__).parents[2]
RATES = cost.Rates(1e12, 1e12, 1e12, 1e12, 5e11, 1e12, 1e10, 1e9, 1e9, 1e-6)
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
FAMILY = {
    "llama": lambda: tiny_model(),
    "biases": lambda: tiny_model(attention_bias=True, mlp_bias=True),
    "mistral": lambda: stock_model(MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": lambda: stock_model(Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": lambda: stock_model(Qwen3ForCausalLM, Qwen3Config, {}),
}


def foreseen(gb: float = 80.0, *, resident: bool = True, changes: dict | None = None, finetune=None, **settings) -> Forecast:
    """The forecast of Llama-3-8B, or of what `changes` make of it, on a card of so many GB."""
    config = LLAMA3 | (changes or {})
    geometry = Geometry.from_config(config)
    source = ModelSource(Path("nowhere"), "hf", geometry, PruningPlan.dense(geometry), config=config)
    job = PruneJob(source, PruneConfig(prune_mlp=True, **settings), test_pruned=True, finetune=finetune)
    machine = Machine(RATES, int(gb * 1e9), int(64e9), int(500e9), int(32e9))
    return forecast(job, make_budget(geometry, job.prune), machine, itemsize=2, device="cuda", resident=resident)


@pytest.mark.parametrize("build", FAMILY.values(), ids=FAMILY)
def test_flops_of_a_forward_are_those_that_torch_counts(build):
    model, windows = build(), random_windows(3, 16)
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(windows)
    setup = cost.Setup(geometry_of(model))
    rotary = 2 * 16 * model.config.head_dim // 2 if hasattr(model.config, "head_dim") else 0
    work = setup.forward(windows.numel(), 16) + setup.head_work(windows.numel())
    assert work.flops == pytest.approx(counted.get_total_flops(), abs=10 * rotary)


def test_what_is_kept_costs_its_share():
    setup = cost.Setup(Geometry.from_config(LLAMA3), attention=2048, mlp=7168)
    assert setup.layer_params(pruned=True) * 2 == setup.layer_params()
    assert setup.forward(512, 512, pruned=True).flops * 2 == setup.forward(512, 512).flops


def test_twice_the_layers_cost_twice_as_much_and_need_no_more_of_a_device_that_streams():
    for resident in (True, False):
        small, large = (foreseen(resident=resident, changes={"num_hidden_layers": count}) for count in (32, 64))
        for one, other in zip(small.costs, large.costs, strict=True):
            if one.stage in ("plan", "apply (repair least_squares)"):
                ratio = other.work.flops / one.work.flops
                assert 1.85 < ratio < 2.1, one.stage  # the head is one, and of more layers each loses less
        few, many = (found.peak("device").device for found in (small, large))
        if resident:
            assert many > few + 10e9
        else:
            assert many == pytest.approx(few, rel=0.05) and many < 5e9


def test_memory_may_lack_on_the_device_or_beside_it():
    roomy = foreseen(80.0)
    host = replace(roomy, machine=replace(roomy.machine, host=roomy.peak("host").host - 1))
    assert [found.lacks_memory for found in (roomy, foreseen(16.0), host)] == [False, True, True]


def test_8b_fits_24_gb_in_memory_and_8_gb_streamed_and_70b_24_gb():
    assert not foreseen(24).missing() and not foreseen(8, resident=False).missing()
    (sentence,) = foreseen(8).missing()
    assert "device memory, 8.0 GB are free" in sentence and "--stream on" in sentence
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    assert not foreseen(24, resident=False, changes=sizes).missing()


def test_what_does_not_fit_names_the_flag_that_helps():
    held = foreseen(24, resident=False, channel_importance_samples=2000)
    cramped = replace(held, machine=replace(held.machine, host=int(30e9)))
    assert any("--hidden_gb or --channel_importance_samples" in sentence for sentence in cramped.missing())
    assert "fewer samples (--repair_samples)" in " ".join(foreseen(2.9, resident=False).missing())
    bound = foreseen(8).missing("--self_samples")
    assert "--self_samples needs all weights at once" in bound[0]
    taught = {"distill_epochs": 1, "distill_model_epochs": 1, "self_samples": 64, "repair_samples": 256}
    for gb, resident in ((48, True), (24, False)):
        (learning,) = foreseen(gb, resident=resident, **taught).missing("--self_samples")
        assert "stage apply" in learning and "lower --distill_last" in learning
        assert not foreseen(gb, resident=resident, distill_last=10, **taught).missing()
    many = foreseen(48, **taught | {"repair_samples": 20000}).missing("--self_samples")
    assert many and "--distill" not in " ".join(many)
    full = replace(held, machine=replace(held.machine, disk=int(1e9)))
    assert any("--no_save_model" in sentence for sentence in full.missing())


def test_a_slower_disk_slows_what_streams_alone():
    for resident in (True, False):
        fast = foreseen(resident=resident)
        slow = replace(fast, machine=replace(fast.machine, rates=replace(RATES, read=1e6)))
        changed = [one.stage for one, other in zip(fast.rows, slow.rows, strict=True) if other.seconds > one.seconds]
        assert ("layer importance" in changed) is not resident


@pytest.mark.parametrize("stage", ["removal", "taylor", "obs", "magnitude", "least_squares", "none", "ppl"])
def test_layers_are_read_as_often_as_is_forecast(stage, model_dir, tmp_path, monkeypatch):
    source, read = find_model(str(model_dir()), "--base_model"), []
    bring = StreamedStore._bring
    monkeypatch.setattr(StreamedStore, "_bring", lambda store, index: read.append(index) or bring(store, index))
    loaded = load_model(source, dtype="float32", device="cpu", stream=Streaming(tmp_path / "work", 1 << 30))
    setup, windows = cost.Setup(source.geometry, 4, 4, resident=False, cpu=True), random_windows(8, 16)
    if stage == "ppl":
        found = ppl.cost(setup, "x", 8, 16)
        ppl.perplexity_of(loaded.runner, windows)
    elif stage == "removal":
        found = layer_analyzer.cost(setup, stage, 8, 16)
        layer_analyzer.removal(loaded.runner, windows)
    elif stage in criteria.CRITERIA:
        found = criteria.cost(setup, stage, 8, 16)
        criteria.score_units(loaded.runner, source.geometry, stage, windows=windows, seed=0)
    else:
        found = healing_cost.cost(setup, stage, 8, 16)
        fewer = PruningPlan(source.geometry, (LayerPlan((0,), tuple(range(48))),) * 4)
        apply.apply_plan(loaded.runner, fewer, repair=stage, windows=windows)
    layers = source.geometry.num_layers
    turned = stage == "taylor"  # on the way back the last layer is there already
    assert len(read) == found.passes * layers - turned


def test_text_that_the_dense_model_writes_for_a_fine_tuning_is_forecast():
    plain, mixed = (
        foreseen(finetune=FinetuneConfig("lora", dataset=dataset, samples=100)) for dataset in (("news",), ("news", "self:3"))
    )
    tokens = (75 + 16) * 512
    work = plain.setup.forward(tokens, 1) + plain.setup.head_work(tokens)
    assert mixed.rows[0].flops - plain.rows[0].flops == work.flops
    assert mixed.rows[0].seconds > plain.rows[0].seconds and mixed.rows[0].device > plain.rows[0].device
    assert [row.flops for row in mixed.rows[1:]] == [row.flops for row in plain.rows[1:]]


def test_constants_of_modules_that_import_more_are_theirs():
    assert (cost.BATCH_TOKENS, cost.LOGIT_ELEMENTS) == (hidden.BATCH_TOKENS, head.LOGIT_ELEMENTS)
    assert (cost.LOGIT_ELEMENTS_CPU, healing_cost.BLOCK) == (head.LOGIT_ELEMENTS_CPU, block_distill.BLOCK)
    assert healing_cost.STRIDE == block_distill.STRIDE
    from LLMPruner.data import self_text
    from LLMPruner.stages import costs

    assert costs.CACHE_TOKENS == self_text.BATCH_TOKENS


def test_a_line_of_the_table_is_a_stage_and_the_last_ones_are_totals_and_what_is_free():
    found = foreseen()
    lines = found.table().splitlines()
    names = ["load", "layer importance", "plan", "apply (repair least_squares)", "save", "evaluate pruned"]
    assert [line[:30].strip() for line in lines] == ["stage", *names, "total, peak", "free"]
    assert len({len(line) for line in lines}) == 1 and "80.00" in lines[-1]
    assert f"{sum(row.seconds for row in found.rows):,.1f}" in lines[-2]
    assert json.loads(json.dumps(found.as_dict()))["stages"][0]["stage"] == "load"


def test_what_was_measured_stands_beside_the_forecast(caplog):
    class Measured:
        stages = [{"stage": "plan", "seconds": 12.5, "peak_memory_gb": 3.25}, {"stage": "another", "seconds": 1}]

    with caplog.at_level(logging.INFO, logger="LLMPruner"):
        logging.getLogger("LLMPruner").propagate = True
        log_comparison(foreseen(), Measured())
    assert "12.5" in caplog.text and "3.25" in caplog.text and "another" not in caplog.text


def test_a_dry_run_needs_a_config_alone_and_imports_no_more_than_torch(tmp_path):
    """Seconds besides those of torch, whose import this machine may be slow at."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA3))
    flags = [f"--base_model={folder}", "--save_ckpt_log_name=exp", "--prune_mlp", "--device=cpu"]
    code = "import sys, llama3_unbalanced_pruning_gqa_aware as script\ncode = script.main(sys.argv[1:])\n"
    code += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))\nsys.exit(code)"

    def run(*command: str) -> tuple[subprocess.CompletedProcess, float]:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        return done, time.perf_counter() - start

    (dry, seconds), (_, torch_alone) = run("-c", code, *flags, "--dry_run"), run("-c", "import torch")
    assert dry.returncode == 0 and ast.literal_eval(dry.stdout.splitlines()[-1]) == ["torch"], dry.stderr
    assert "forecast (" in dry.stdout and "predicted size: 12045.4 MB" in dry.stdout
    assert seconds < torch_alone + 3
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder] == ["training.log"]
    real, _ = run("-c", code, *flags)
    assert real.returncode == 2 and "has no safetensors weights" in real.stderr


def test_sizes_of_the_tests_are_a_model_that_the_formulas_know():
    assert cost.Setup(Geometry.from_config(SIZES)).weights() == 2 * Geometry.from_config(SIZES).dense_params
