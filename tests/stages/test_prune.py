"""The stages of pruning: called alone they give what the script writes, and each does its own part only."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_windows, tiny_model

import llama3_unbalanced_pruning_gqa_aware as script
from LLMPruner.config import CommonConfig, PruneConfig
from LLMPruner.importance.budget import level_limits, make_budget
from LLMPruner.importance.criteria import UnitScores, score_units
from LLMPruner.importance.layer_analyzer import LAYER_METHODS
from LLMPruner.importance.search.search import find_levels, prepare
from LLMPruner.importance.search.state import SearchState
from LLMPruner.model.forward import LayerRunner
from LLMPruner.model.load import LoadedModel, load_model, load_tokenizer
from LLMPruner.model.source import find_model
from LLMPruner.plan import PruningPlan
from LLMPruner.run import Run
from LLMPruner.stages import prune as stages
from LLMPruner.stages import steps
from LLMPruner.stages.job import PruneJob, check_prune

SMALL = ["--layer_importance_samples=6", "--channel_importance_samples=8", "--calibration_seq_len=64", "--prune_mlp"]
SMALL += ["--layer_importance_seq_len=32", "--dtype=float32", "--device=cpu", "--pruning_ratio=0.4"]


@pytest.fixture
def flags(trained_dir, data_dir, tmp_path, monkeypatch) -> list[str]:
    """Flags of a small run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--save_ckpt_log_name=exp", *SMALL]


@pytest.fixture
def loaded(trained_dir) -> LoadedModel:
    return load_model(find_model(str(trained_dir), "--base_model"), dtype="float32", device="cpu")


def by_hand(job: PruneJob) -> LoadedModel:
    """The job's model, pruned by the functions of the stages alone: no run, no folder, no record."""
    job = job.sized()
    config, common = job.prune, job.common
    budget, _ = check_prune(job, Path("nowhere"))
    tokenizer = load_tokenizer(job.source)
    windows = job.windows(tokenizer)
    loaded = load_model(job.source, dtype=common.dtype, device=common.device, tokenizer=tokenizer)
    scores = steps.score_layers(loaded.runner, windows.layers, job).scores if job.analyzes else None
    if config.pruning_strategy == "search":
        held_out, state = steps.search_text(loaded, windows.held_out, config, common), SearchState()
        fitness = prepare(loaded.runner, budget, config, windows.calibration, held_out, seed=common.seed)
        limits = level_limits(budget, config, scores)
        find_levels(fitness, budget, config, limits=limits, state=state, save=lambda _: None, deadline=math.inf)
        plan = steps.plan_of_counts(budget, config, budget.kept(state.levels), fitness.database.scores)
    else:
        settings = {"windows": windows.calibration, "seed": common.seed}
        units = score_units(loaded.runner, budget.geometry, config.importance, **settings)
        plan = steps.plan_by_scores(budget, config, scores, units)
    text = windows.repair
    if job.writes:
        text = steps.repair_text(text, steps.write_repair_text(loaded, config, common), common)
    steps.apply(loaded.runner, plan, text, config, common)
    loaded.plan = plan
    return loaded


BEST = ["--preset=best", "--search_tokens=128", "--repair_samples=16", "--self_samples=3", "--distill_epochs=1"]
BEST += ["--distill_model_epochs=1", "--calibration_bos=on"]


@pytest.mark.parametrize(
    "choices",
    [[], ["--preset=flap"], ["--preset=osscar", "--freeze_top_n_layers=1", "--pruning_ratio=0.2"], BEST],
    ids=["default", "flap", "osscar", "best"],
)
def test_the_stages_called_alone_give_the_plan_and_the_weights_of_the_script(flags, choices):
    torch.manual_seed(0)  # not the script's: the stages draw from generators of their own
    own = by_hand(script.build_job(script.parse([*flags, *choices])))
    assert not Path("prune_log").exists()
    assert script.main([*flags, *choices]) == 0
    source = find_model("prune_log/exp/pytorch_model.bin", "--model_path")
    theirs = load_model(source, dtype="float32", device="cpu")
    assert own.plan == theirs.plan == PruningPlan.from_json(Path("prune_log/exp/pruning_plan.json").read_text())
    assert own.plan.removed_params > 0 and own.model.state_dict().keys() == theirs.model.state_dict().keys()
    for name, weight in own.model.state_dict().items():
        assert weight.equal(theirs.model.state_dict()[name]), name


def test_the_function_is_the_script_and_returns_the_model_that_it_saves(flags):
    job = script.build_job(script.parse([*flags, "--test_after_prune", "--eval_seq_len=64", "--eval_samples=4"]))
    budget, importance = check_prune(job, Path("prune_log/exp"))
    with Run(Path("prune_log/exp"), "script.py", flags, seed=job.common.seed, device="cpu") as run:
        pruned = stages.prune(job, run, budget, importance)
    saved = load_model(find_model("prune_log/exp/pytorch_model.bin", "--model_path"), dtype="float32", device="cpu")
    assert pruned.plan == saved.plan and pruned.provenance == saved.provenance
    assert all(weight.equal(saved.model.state_dict()[name]) for name, weight in pruned.model.state_dict().items())
    names = ["load", "layer importance", "plan", "apply (repair least_squares)", "save", "evaluate pruned"]
    assert [stage["stage"] for stage in run.stages] == names
    assert run.metrics["parameters"] == {"original": budget.geometry.dense_params, "pruned": pruned.plan.total_params}
    assert pruned.provenance["settings"]["importance"] == "taylor" and pruned.provenance["command"] == run.command


def test_a_run_says_before_what_it_will_cost_and_afterwards_what_it_did(flags, capsys):
    assert script.main([*flags, "--stream=on"]) == 0
    output = capsys.readouterr().out
    assert output.index("forecast (weights read layer by layer") < output.index("stage load: start")
    rows = output.split("forecast and measured")[1]
    assert all(name in rows for name in ("load", "layer importance", "plan", "apply (repair least_squares)", "save"))


def test_auto_streams_where_the_forecast_does_not_fit_and_says_so_where_nothing_can(flags, monkeypatch, capsys):
    monkeypatch.setattr("LLMPruner.stages.forecast.available_memory", lambda device: 1 << 20)
    assert script.main(flags) == 0
    assert "streaming" in capsys.readouterr().out
    assert script.main([*flags, "--self_samples=2"]) == 0
    output = capsys.readouterr().out
    assert "loading" in output and "WARNING forecast: stage" in output and "--self_samples needs all weights at once" in output


def test_layer_scores_come_with_what_they_were_measured_on(flags):
    job = script.build_job(script.parse([*flags, "--layer_importance_method=activation", "--seed=5"]))
    runner, windows = LayerRunner.of(tiny_model()), random_windows(3, 8)
    scores = steps.score_layers(runner, windows, job)
    assert list(scores.scores) == LAYER_METHODS["activation"](runner, windows)
    assert (scores.method, scores.samples, scores.seq_len, scores.seed) == ("activation", 3, 8, 5)
    assert (scores.corpus, scores.split, scores.fingerprint) == ("wikitext2", "train", job.source.fingerprint())


@pytest.mark.parametrize("repair", ["least_squares", "bias"])
def test_a_plan_keeps_the_best_units_and_adds_a_bias_where_the_repair_will(loaded, repair):
    config = PruneConfig(0.3, prune_mlp=True, pruning_strategy="uniform", repair=repair)
    budget = make_budget(loaded.plan.geometry, config)
    units = [UnitScores(torch.tensor([1.0, 2.0]), torch.arange(96.0))] * 4
    kept = {(layer, kind): count for layer in range(4) for kind, count in (("attention", 1), ("mlp", 48))}
    plan = steps.plan_of_counts(budget, config, kept, units)
    assert plan.output_bias == (repair == "bias")
    assert {(layer.kv_groups, layer.channels) for layer in plan.layers} == {((1,), tuple(range(48, 96)))}
    chosen = steps.plan_by_scores(budget, config, [1.0] * 4, units)
    assert chosen.removed_params >= budget.target and chosen.output_bias == plan.output_bias
    assert all(layer.kv_groups in ((1,), (0, 1)) and layer.channels[-1] == 95 for layer in chosen.layers)


def rows(windows: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(map(tuple, windows.tolist()))


def test_the_repair_reads_the_corpus_and_what_the_model_wrote_in_an_order_of_the_seed(loaded):
    config, common = PruneConfig(calibration_seq_len=16, self_samples=3), CommonConfig(seed=5)
    written, corpus = steps.write_repair_text(loaded, config, common), random_windows(5, 16)
    assert written.shape == (3, 16) and written.equal(steps.write_repair_text(loaded, config, common))
    assert not written.equal(steps.write_repair_text(loaded, config, replace(common, seed=6)))
    both = steps.repair_text(corpus, written, common)
    assert rows(both) == sorted(rows(corpus) + rows(written)) and both.equal(steps.repair_text(corpus, written, common))
    assert not both.equal(steps.repair_text(corpus, written, replace(common, seed=6)))
    assert rows(both[:5]) != rows(corpus), "a repair holds out every fourth window, which must not be of one kind"


def test_no_more_is_written_for_a_search_than_its_corpus_has(loaded):
    """Many tokens asked of a small corpus must not become hours of writing."""
    config, held_out = PruneConfig(pruning_strategy="search", calibration_seq_len=16, search_tokens=640), random_windows(3, 16)
    text = steps.search_text(loaded, held_out, config, CommonConfig())
    assert text.shape == (6, 16)
    assert {tuple(row) for row in held_out.tolist()} < {tuple(row) for row in text.tolist()}
    alone = PruneConfig(pruning_strategy="search", calibration_seq_len=16, search_tokens=16)
    assert steps.search_text(loaded, held_out[:1], alone, CommonConfig()).equal(held_out[:1]), "a single window is the corpus's"


def test_applying_without_a_repair_needs_no_text_and_only_slices(loaded):
    config = PruneConfig(0.3, prune_mlp=True, repair="none", pruning_strategy="uniform", importance="magnitude")
    budget = make_budget(loaded.plan.geometry, config)
    dense = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    units = score_units(loaded.runner, budget.geometry, "magnitude", windows=None, seed=0)
    plan = steps.plan_by_scores(budget, config, [1.0] * 4, units)
    steps.apply(loaded.runner, plan, None, config, CommonConfig())
    for index, layer in enumerate(plan.layers):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert loaded.model.state_dict()[name].equal(dense[name][:, list(layer.channels)])
