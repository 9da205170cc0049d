"""The pruning script: end to end on a tiny model, and every wrong command it must refuse before loading anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import llama3_unbalanced_pruning_gqa_aware as script
from LLMPruner.config import PRESETS
from LLMPruner.importance.allocation import STRATEGIES
from LLMPruner.importance.criteria import CRITERIA
from LLMPruner.methods.repair import REPAIRS
from LLMPruner.model.load import load_model, save_model
from LLMPruner.model.source import find_model
from LLMPruner.plan import PruningPlan

ROOT = Path(__file__).parent.parent
SMALL = [
    "--layer_importance_samples=6",
    "--channel_importance_samples=8",
    "--calibration_seq_len=64",
    "--layer_importance_seq_len=32",
    "--eval_seq_len=64",
    "--eval_samples=8",
    "--dtype=float32",
]


@pytest.fixture
def command(trained_dir, data_dir, tmp_path, monkeypatch):
    """Runs the script in a folder of its own; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, name="exp", base=trained_dir):
        return script.main([f"--base_model={base}", f"--data_dir={data_dir}", f"--save_ckpt_log_name={name}", *SMALL, *flags])

    run.base = trained_dir
    return run


def test_a_run_leaves_what_the_document_promises(command):
    assert command("--prune_mlp", "--test_original_ppl", "--test_after_prune") == 0
    folder = Path("prune_log/exp")
    for name in (
        "description.txt",
        "layer_importance_config.json",
        "pruning_plan.json",
        "pruning_strategy.png",
        "metrics.json",
    ):
        assert (folder / name).stat().st_size > 0
    (stamp,) = [path for path in folder.iterdir() if path.is_dir()]
    log = (stamp / "training.log").read_text()
    assert log.count("PPL original on wikitext2") == 1 and log.count("PPL pruned on wikitext2") == 1 and "PPL 对比结果" in log
    assert os.access(stamp / "train.sh", os.X_OK) and "--prune_mlp" in (stamp / "train.sh").read_text()

    plan = PruningPlan.from_json((folder / "pruning_plan.json").read_text())
    loaded = load_model(find_model(str(folder / "pytorch_model.bin"), "--base_model"), dtype="float32", device="cpu")
    assert loaded.plan == plan
    assert sum(p.numel() for p in loaded.model.parameters()) == plan.total_params == loaded.provenance["parameters"]
    assert plan.removed_params >= 0.25 * plan.geometry.dense_params
    assert loaded.provenance["calibration"] == {"corpus": "wikitext2", "split": "train"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["ppl"]["pruned"][0]["ppl"] > metrics["ppl"]["original"][0]["ppl"] > 1
    assert {stage["stage"] for stage in metrics["stages"]} >= {"load", "layer importance", "plan", "save"}


@pytest.mark.parametrize("flags", [["--prune_mlp"], ["--preset=best", "--prune_mlp", "--search_tokens=128"]])
def test_the_same_seed_gives_the_same_plan_and_ppl_to_the_last_digit(command, flags):
    results = []
    for name in ("one", "two"):
        assert command(*flags, "--test_after_prune", name=name) == 0
        metrics = json.loads(Path("prune_log", name, "metrics.json").read_text())
        results.append((Path("prune_log", name, "pruning_plan.json").read_text(), metrics["ppl"]["pruned"][0]["ppl"]))
    assert results[0] == results[1]


def test_plan_b_is_one_command(command):
    flags = ["--finetune_samples=32", "--finetune_epochs=1", "--finetune_seq_len=64", "--finetune_lr=1e-3", "--lora_r=4"]
    assert command("--prune_mlp", "--pruning_ratio=0.4", "--finetune", "--finetune_method=lora", *flags) == 0
    metrics = json.loads(Path("prune_log/exp/metrics.json").read_text())["ppl"]
    assert metrics["finetuned"][0]["ppl"] < metrics["pruned"][0]["ppl"]
    source = find_model("prune_log/exp/pytorch_model_finetuned.bin", "--model_path")
    assert source.plan.removed_params > 0
    assert Path("prune_log/exp/adapter/adapter_model.safetensors").is_file()


def test_scores_are_reused_for_another_ratio_and_refused_for_another_model(command, tmp_path, trained_dir, capsys):
    assert command("--prune_mlp", name="first", base=trained_dir) == 0
    scores = "--layer_importance_config=prune_log/first/layer_importance_config.json"
    assert command("--prune_mlp", "--pruning_ratio=0.3", "--skip_importance_analysis", scores, name="second") == 0
    assert "layer importance" not in [
        s["stage"] for s in json.loads(Path("prune_log/second/metrics.json").read_text())["stages"]
    ]
    other = tmp_path / "other"
    tiny_model(seed=5).save_pretrained(other)
    assert command("--prune_mlp", "--skip_importance_analysis", scores, name="third", base=other) == 2
    assert "another model" in capsys.readouterr().err
    assert not Path("prune_log/third").exists()


def test_dry_run_prints_sizes_and_a_forecast_and_writes_nothing_but_the_log(command, capsys):
    assert command("--prune_mlp", "--dry_run", "--test_after_prune") == 0
    output = capsys.readouterr().out
    assert "budget: remove" in output and "predicted size" in output and "keeps about" in output
    assert "layer importance" in output and "apply (repair least_squares)" in output and "evaluate pruned" in output
    files = [path for path in Path("prune_log").rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["training.log"]


@pytest.mark.parametrize(
    "flag",
    [f"--importance={name}" for name in CRITERIA]
    + [f"--pruning_strategy={name}" for name in STRATEGIES]
    + [f"--repair={name}" for name in REPAIRS]
    + [f"--preset={name}" for name in PRESETS],
)
def test_every_choice_meets_the_budget(command, flag):
    assert command("--prune_mlp", "--no_save_model", "--search_generations=2", "--search_tokens=128", flag) == 0
    plan = PruningPlan.from_json(Path("prune_log/exp/pruning_plan.json").read_text())
    step = 4 * plan.geometry.unit_params("mlp")
    assert 0 <= plan.removed_params - 0.25 * plan.geometry.dense_params < step
    assert not Path("prune_log/exp/pytorch_model.bin").exists()


def test_a_preset_sets_three_choices_and_explicit_flags_win(command):
    assert command("--preset=flap", "--prune_mlp", "--repair=none", "--dry_run") == 0
    (log,) = Path("prune_log/exp").glob("*/training.log")
    assert "apply (repair none)" in log.read_text() and "layer importance" not in log.read_text()
    args = script.parse(["--save_ckpt_log_name=x", "--repair", "none", "--preset", "flap"])
    assert (args.importance, args.pruning_strategy, args.repair) == ("flap", "global", "none")


def test_the_model_may_write_a_part_of_its_calibration_text(command):
    """The repair alone reads it: the plan is the same, the healed weights are not; without a repair nothing is written."""
    for name, flags in {"corpus": [], "written": ["--self_samples=4"], "blind": ["--self_samples=4", "--repair=none"]}.items():
        assert command("--prune_mlp", *flags, name=name) == 0
    plans = {Path("prune_log", name, "pruning_plan.json").read_text() for name in ("corpus", "written", "blind")}
    checkpoints = [f"prune_log/{name}/pytorch_model.bin" for name in ("corpus", "written")]
    models = [load_model(find_model(path, "--base_model"), dtype="float32", device="cpu").model for path in checkpoints]
    assert len(plans) == 1
    assert not all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    logs = {name: next(Path("prune_log", name).glob("*/training.log")).read_text() for name in ("written", "blind")}
    assert "stage write" in logs["written"] and "stage write" not in logs["blind"]


def test_distillation_follows_the_repair_and_the_card_says_so(command):
    """The plan is the same, other weights than the repair's change; without a repair there is nothing to learn from."""
    distilled = ["--distill_epochs=1", "--distill_model_epochs=2", "--distill_last=3", "--distill_labels=0.25"]
    runs = {"repaired": [], "distilled": distilled, "blind": ["--distill_epochs=1", "--repair=none"]}
    runs["whole"] = ["--distill_model_epochs=1"]
    logs, cards = {}, {}
    for name, flags in runs.items():
        assert command("--prune_mlp", "--export=hf", *flags, name=name) == 0
        logs[name] = next(Path("prune_log", name).glob("*/training.log")).read_text()
        cards[name] = Path("prune_log", name, "hf/README.md").read_text()
    assert len({Path("prune_log", name, "pruning_plan.json").read_text() for name in runs}) == 1
    assert [name for name in runs if "layers 1 to 3 distilled: loss against dense" in logs[name]] == ["distilled"]
    said = ("epochs of blockwise distillation | `1`", "distributions | `2`", "last layers | `3`", "next tokens in it | `0.25`")
    for row in said:
        assert [name for name in runs if row in cards[name]] == ["distilled"]
    for row in ("by next-token distributions | `1`", "next tokens in it | `0.5`"):
        assert [name for name in runs if row in cards[name]] == ["whole"]
    assert "blockwise" not in cards["whole"] and "last layers" not in cards["whole"]


def test_a_bias_that_the_repair_added_survives_the_checkpoint(command):
    assert command("--preset=flap", "--prune_mlp", "--pruning_ratio=0.4") == 0
    source = find_model("prune_log/exp/pytorch_model.bin", "--base_model")
    loaded = load_model(source, dtype="float32", device="cpu")
    biases = {name for name, _ in loaded.model.named_parameters() if name.endswith("bias")}
    assert biases and all(name.endswith(("o_proj.bias", "down_proj.bias")) for name in biases)
    assert source.plan.removed_params >= 0.4 * source.geometry.dense_params


def search_flags(*flags):
    return ["--preset=best", "--prune_mlp", "--pruning_ratio=0.4", "--search_tokens=128", *flags]


def test_half_of_what_a_search_measures_on_is_written_by_the_dense_model_and_not_what_the_repair_reads(command, monkeypatch):
    from LLMPruner.data import self_text
    from LLMPruner.importance.search import search

    seen, texts, start, write = [], [], search.Fitness.__init__, self_text.write_windows
    monkeypatch.setattr(search.Fitness, "__init__", lambda self, base, rows: seen.append(rows) or start(self, base, rows))
    monkeypatch.setattr(self_text, "write_windows", lambda *a, **kw: texts.append(write(*a, **kw)) or texts[-1])
    flags = ["--search_tokens=640", "--search_generations=1", "--no_save_model"]
    assert command(*search_flags(*flags)) == 0
    for_search, for_repair = ({tuple(row) for row in text.tolist()} for text in texts)
    (measured,) = seen
    own = [tuple(row) in for_search for row in measured.tolist()]
    assert len(own) == 10 and sum(own) == 5 and 2 <= sum(own[:5]) <= 3 and 1 <= sum(own[:3]) <= 2, "every part is of both kinds"
    assert not for_search & for_repair
    assert command(*search_flags("--search_tokens=64", *flags[1:]), name="little") == 0
    assert len(seen[1]) == 1, "a single window is one of the corpus"


def test_an_interrupted_search_continues_to_the_same_plan(command, monkeypatch, capsys):
    """Ctrl-C in the middle of a generation leaves the state; --resume ends where a whole run ends, measuring the rest."""
    from LLMPruner.importance.search import search
    from LLMPruner.importance.search.state import STATE_FORMAT

    calls, alone = [], search.Fitness.alone
    monkeypatch.setattr(search.Fitness, "alone", lambda *args: calls.append(args) or alone(*args))
    assert command(*search_flags("--search_generations=4"), name="whole") == 0
    total, stop = len(calls), len(calls) - 3

    def interrupted(*args):
        if len(calls) == stop:
            raise KeyboardInterrupt
        return calls.append(args) or alone(*args)

    calls.clear()
    monkeypatch.setattr(search.Fitness, "alone", interrupted)
    assert command(*search_flags("--search_generations=4"), name="part") == 130
    state = json.loads(Path("prune_log/part/search_state.json").read_text())
    assert state["generation"] >= 1 and state["levels"] and any(state["shifts"])
    assert not Path("prune_log/part/pytorch_model.bin").exists()
    monkeypatch.setattr(search.Fitness, "alone", lambda *args: calls.append(args) or alone(*args))
    assert command(*search_flags("--search_generations=4", "--resume"), name="part") == 0
    whole, part = (Path("prune_log", name, "pruning_plan.json").read_text() for name in ("whole", "part"))
    assert whole == part and len(calls) == total, "nothing is measured twice"
    flags = ["--search_generations=4", "--resume", "--distill_epochs=0", "--repair_samples=3"]
    assert command(*search_flags(*flags), name="part") == 0, "what comes after the search may change"
    for other in ("--pruning_ratio=0.3", "--dtype=bfloat16"):
        assert command(*search_flags("--search_generations=4", "--resume", other), name="part") == 2
        assert "other settings" in capsys.readouterr().err
    monkeypatch.setattr("LLMPruner.stages.job.STATE_FORMAT", STATE_FORMAT - 1)  # a release whose costs meant something else
    assert command(*search_flags("--search_generations=4", "--resume"), name="part") == 2
    assert "search anew" in capsys.readouterr().err


@pytest.mark.parametrize("minutes, generations", [(1, 0), (2, 2)])
def test_the_search_ends_after_its_minutes(command, monkeypatch, minutes, generations):
    monkeypatch.setattr("LLMPruner.stages.prune.time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr("LLMPruner.importance.search.search.time", SimpleNamespace(monotonic=lambda: 1000.0 + 90))
    assert command(*search_flags("--search_generations=2", f"--search_minutes={minutes}", "--distill_epochs=0")) == 0
    state = json.loads(Path("prune_log/exp/search_state.json").read_text())
    assert state["generation"] == generations


def test_whole_sublayers_may_go_and_the_model_still_works(command):
    flags = ["--allow_sublayer_removal", "--max_pruning_rate=1", "--search_generations=1", "--pruning_ratio=0.66"]
    assert command("--preset=best", "--prune_mlp", "--search_tokens=128", *flags) == 0
    source = find_model("prune_log/exp/pytorch_model.bin", "--base_model")
    assert 0 in source.plan.kv_counts + source.plan.channel_counts, "a ratio this high needs it, or this test proves nothing"
    loaded = load_model(source, dtype="float32", device="cpu")
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (loaded.model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    import diagnose_model

    assert diagnose_model.main(["--model_path=prune_log/exp/pytorch_model.bin"]) == 0


def test_a_run_that_reads_no_text_asks_for_none(command, data_dir):
    assert command("--prune_mlp", name="scores") == 0
    scores = "--layer_importance_config=prune_log/scores/layer_importance_config.json"
    flags = ["--importance=magnitude", "--repair=none", "--skip_importance_analysis", scores, "--calibration_dataset=c4"]
    assert command("--prune_mlp", *flags, name="blind") == 0


def test_the_input_is_never_overwritten(command, capsys):
    """A dense model in the very file that the run would write."""
    dense = load_model(find_model(str(command.base), "--base_model"), dtype="float32", device="cpu")
    Path("prune_log/exp").mkdir(parents=True)
    save_model(Path("prune_log/exp/pytorch_model.bin"), dense)
    before = Path("prune_log/exp/pytorch_model.bin").read_bytes()
    assert command("--prune_mlp", base="prune_log/exp/pytorch_model.bin") == 2
    assert "would overwrite" in capsys.readouterr().err
    assert Path("prune_log/exp/pytorch_model.bin").read_bytes() == before


def test_a_checkpoint_is_not_left_beside_another_runs_plan(command, capsys):
    assert command("--prune_mlp") == 0
    plan = Path("prune_log/exp/pruning_plan.json").read_text()
    assert command("--prune_mlp", "--pruning_ratio=0.4", "--no_save_model") == 2
    assert "no longer fit" in capsys.readouterr().err and Path("prune_log/exp/pruning_plan.json").read_text() == plan


def test_what_was_measured_survives_a_training_that_fails(command):
    flags = ["--finetune", "--finetune_method=full", "--finetune_lr=1e20", "--finetune_samples=8", "--finetune_seq_len=64"]
    assert command("--prune_mlp", "--test_after_prune", *flags) == 1
    assert json.loads(Path("prune_log/exp/metrics.json").read_text())["ppl"]["pruned"][0]["ppl"] > 1
    assert Path("prune_log/exp/pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pruning_ratio=0"], "--pruning_ratio"),
        (["--pruning_ratio=1"], "--pruning_ratio"),
        (["--pruning_ratio=-0.5"], "--pruning_ratio"),
        (["--pruning_ratio=nan"], "--pruning_ratio"),
        (["--pruning_ratio=abc"], "--pruning_ratio"),
        (["--pruning_ratio=0.99", "--prune_mlp"], "largest feasible ratio"),
        (["--no_prune_attention"], "--prune_mlp"),
        (["--layer_start=3", "--layer_end=2"], "--layer_start"),
        (["--layer_start=2", "--layer_end=2"], "--layer_start"),
        (["--layer_end=9"], "--layer_end"),
        (["--layer_start=-1"], "--layer_start"),
        (["--skip_importance_analysis"], "--layer_importance_config"),
        (["--skip_importance_analysis", "--layer_importance_config=none.json"], "does not exist"),
        (["--calibration_dataset=nothere"], "unknown corpus"),
        (["--calibration_dataset=alpaca"], "holds chats"),
        (["--finetune", "--finetune_seq_len=64", "--finetune_dataset", "wikitext2", "nothere:2"], "unknown corpus"),
        (["--finetune", "--finetune_seq_len=64", "--finetune_dataset", "wikitext2:x"], "--finetune_dataset wikitext2:x"),
        (["--test_after_prune", "--eval_datasets=nothere"], "unknown corpus"),
        (["--data_dir=nothere"], "--data_dir"),
        (["--layer_importance_samples=0"], "--layer_importance_samples"),
        (["--channel_importance_samples=-1"], "--channel_importance_samples"),
        (["--calibration_seq_len=1"], "--calibration_seq_len"),
        (["--calibration_seq_len=100000"], "positions"),
        (["--test_after_prune", "--eval_seq_len=100000"], "positions"),
        (["--finetune", "--finetune_seq_len=100000"], "positions"),
        (["--finetune", "--finetune_batch_size=0"], "--finetune_batch_size"),
        (["--lora_r=0", "--finetune"], "--lora_r"),
        (["--round_to=0"], "--round_to"),
        (["--self_samples=-1"], "--self_samples"),
        (["--distill_epochs=-1"], "--distill_epochs"),
        (["--max_pruning_rate=0.1", "--min_pruning_rate=0.5"], "--min_pruning_rate"),
        (["--freeze_top_n_layers=4"], "--freeze_top_n_layers"),
        (["--importance=magic"], "--importance"),
        (["--dtype=int3"], "--dtype"),
        (["--seed=-1"], "--seed"),
        (["--preset=worst"], "--preset"),
        (["--resume"], "no interrupted run"),
        (["--preset=best", "--resume"], "no interrupted run"),
        (["--allow_sublayer_removal"], "--pruning_strategy search"),
        (["--preset=best", "--search_tokens=1"], "--search_tokens"),
        (["--preset=best", "--search_minutes=nan"], "--search_minutes"),
        (["--preset=best", "--search_generations=-1"], "--search_generations"),
        (["--finetune", "--finetune_method=full", "--lora_target_mlp"], "--finetune_method lora"),
        (["--save_ckpt_log_name=" + 250 * "x"], "250 bytes"),
        (["--base_model=" + 300 * "x"], "cannot be read"),
        (["--base_model=~nosuchuser/x"], "cannot be read"),
        (["--data_dir=" + 300 * "x"], "cannot be read"),
        (["--device=meta"], "--device"),
        (["--seed=4294967296"], "--seed"),
        (["--unknown_flag"], "--unknown_flag"),
        (["--save_ckpt_log_name=a/b"], "--save_ckpt_log_name"),
        (["--save_ckpt_log_name=.."], "--save_ckpt_log_name"),
        (["--base_model=/nowhere/model"], "does not exist"),
        (["--base_model=."], "config.json"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_changes_nothing(command, capsys, flags, words):
    try:
        code = command(*flags)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(Path().iterdir()) == []


def test_a_full_disk_is_noticed_before_anything_is_written(command, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert command("--prune_mlp") == 2
    assert "free" in capsys.readouterr().err and list(Path().iterdir()) == []


def test_an_unwritable_place_is_refused(command, capsys):
    Path("prune_log").write_text("a file where the folder should be")
    assert command() == 2
    assert "prune_log" in capsys.readouterr().err


def test_a_corpus_shorter_than_a_window_is_refused(command, capsys, tmp_path):
    for length in (10, 100):  # shorter in bytes, and shorter only in tokens
        Path("short.txt").write_text("The cat chases the mouse quickly . " * (length // 5))
        assert command("--calibration_dataset=short.txt", "--calibration_seq_len=250") == 2
        assert "shorter than one window" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["short.txt"]


def test_an_interrupt_exits_130_and_leaves_no_half_written_file(command, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert command("--prune_mlp") == 130
    assert not [path for path in Path("prune_log").rglob("*") if "pytorch_model" in path.name]


def test_help_and_errors_answer_before_torch_is_imported():
    for flags, code in ((["--help"], 0), (["--save_ckpt_log_name=x", "--pruning_ratio=2"], 2)):
        probe = f"import sys, {script.__name__} as s\ntry: c = s.main({flags!r})\nexcept SystemExit as e: c = e.code\n"
        probe += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(c)"
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert time.perf_counter() - start < 5  # well under one second when the machine is idle


def test_train_sh_runs_the_command_again(command, trained_dir):
    assert command("--prune_mlp", "--no_save_model") == 0
    (first,) = Path("prune_log/exp").glob("*/train.sh")
    done = subprocess.run(["bash", str(first)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(Path("prune_log/exp").glob("*/training.log"))) == 2


def test_a_perplexity_says_of_which_text_it_is(trained_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--importance=magnitude", "--repair=none", "--prune_mlp"]
    flags += [
        "--pruning_strategy=uniform",
        "--test_after_prune",
        "--eval_seq_len=32",
        "--pruning_ratio=0.2",
        "--device=cpu",
        "--calibration_seq_len=32",
    ]
    splits = {}
    for text_format in ("clean", "raw"):
        assert script.main([*flags, f"--text_format={text_format}", f"--save_ckpt_log_name={text_format}", "--save_model"]) == 0
        metrics = json.loads(Path(f"prune_log/{text_format}/metrics.json").read_text())
        splits[text_format] = metrics["ppl"]["pruned"][0]["split"]
    assert splits == {"clean": "test", "raw": "test (raw text)"}
