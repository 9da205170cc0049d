"""Several processes give what one gives, and write what one writes; what cannot be shared is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diagnose_model
import evaluate_models
import llama3_unbalanced_pruning_gqa_aware as script
import test_finetuning
from LLMPruner import cli, parallel
from LLMPruner.errors import UsageError
from LLMPruner.model.checkpoint import load_checkpoint
from LLMPruner.model.device import resolve_device

TESTS = Path(__file__).parent
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
SMALL = ["--layer_importance_samples=7", "--channel_importance_samples=11", "--calibration_seq_len=64", "--eval_seq_len=64"]
SMALL += ["--layer_importance_seq_len=32", "--eval_samples=9", "--dtype=float32", "--device=cpu", "--prune_mlp"]


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of several, as a launcher's environment does."""

    def become(rank: int, count: int = 2) -> None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
            monkeypatch.setenv(name, str(value))

    return become


def tuning(model: Path, data_dir: Path) -> list[str]:
    """The command line of a fine-tuning, all but its batch."""
    flags = [f"--model_path={model}", f"--teacher={model}", f"--data_dir={data_dir}", "--save_name=tuned", "--use_lora"]
    flags += ["--distill", "--teacher_answers=cached", "--lora_dropout=0", "--samples=16", "--epochs=2", "--seq_len=32"]
    return [*flags, "--grad_accum=1", "--check_steps=3", "--lr=5e-3", "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trained_dir, data_dir):
    """The folder in which two processes did what tests/together.py says, and one process, the run `alone`."""
    folder = tmp_path_factory.mktemp("runs")
    place = [f"--base_model={trained_dir}", f"--data_dir={data_dir}"]
    prune = [*place, *SMALL, "--test_original_ppl", "--test_after_prune"]
    evaluate = [f"--original_model={trained_dir}", f"--data_dir={data_dir}", "--seq_len=64", "--eval_samples=9"]
    evaluate += ["--device=cpu", "--dtype=float32", "--save_results=results.json"]
    asked = {"prune": prune, "evaluate": evaluate, "tune": [*tuning(trained_dir, data_dir), "--batch_size=2"]}
    command = [sys.executable, *LAUNCH, TESTS / "together.py", json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (folder / "output").write_text(result.stdout + result.stderr)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert script.main([*prune, "--save_ckpt_log_name=alone"]) == 0
    return folder


def outcome(runs: Path, name: str) -> tuple[dict[str, torch.Tensor], str, dict]:
    """What a run leaves: weights, plan, metrics."""
    folder = runs / "prune_log" / name
    tensors, _ = load_checkpoint(folder / "pytorch_model.bin")
    return tensors, (folder / "pruning_plan.json").read_text(), json.loads((folder / "metrics.json").read_text())


def test_what_processes_find_is_put_together_in_their_order(runs):
    first, second = (json.loads((runs / f"found{rank}.json").read_text()) for rank in range(2))
    for name in ("evaluated", "whole", "tuned", "resumed"):
        assert first[name] == second[name] == 0
    shares = [found["exchanged"].pop("share") for found in (first, second)]
    assert shares == [[0, 2], [2, 5]]
    expected = {
        "summed": [[3.0, 9.0], [6.0, 12.0]],
        "gathered": [[0.0], [1.0], [2.0], [10.0]],
        "flags": [False, True, True, True],
        "least": 6,
        "told": [[0.0, 0.0], [0.0, 0.0]],
        "heard": {"rank": 0},
    }
    assert first["exchanged"] == second["exchanged"] == expected
    for found in (first["few"], second["few"], first["many"], second["many"]):
        assert found[0] == 24 and max(found[1:]) < 1e-5, "moments of all tokens, wherever they were added"
    assert max(first["few"][2:4]) == 0, "few tokens stay as they are, in their order"


def test_several_processes_prune_as_one(runs):
    tensors, plan, metrics = outcome(runs, "whole")
    alone, wanted, reference = outcome(runs, "alone")
    assert plan == wanted and list(tensors) == list(alone) and metrics["processes"] == 2
    for name, weight in alone.items():
        assert (tensors[name] - weight).norm() <= 1e-4 * weight.norm(), name
    for role in ("original", "pruned"):
        assert metrics["ppl"][role][0] == reference["ppl"][role][0] | {
            "ppl": pytest.approx(reference["ppl"][role][0]["ppl"], rel=1e-6)
        }
    scores = [
        json.loads((runs / "prune_log" / name / "layer_importance_config.json").read_text()) for name in ("whole", "alone")
    ]
    assert scores[0] == scores[1] | {"scores": pytest.approx(scores[1]["scores"], rel=1e-6)}


def test_the_first_process_alone_writes_and_reports(runs):
    files, alone = (
        sorted(path.name for path in (runs / "prune_log" / name).rglob("*") if path.is_file()) for name in ("whole", "alone")
    )
    assert files == alone and files.count("training.log") == files.count("pytorch_model.bin") == 1
    (log,) = (runs / "prune_log" / "whole").rglob("training.log")
    assert log.read_text().count("PPL pruned on") == 1
    written = [json.loads((runs / f"found{rank}.json").read_text())["written"] for rank in range(2)]
    assert all(name.startswith("answers_") for name in written[1]), "what each asked its own teacher"
    assert {"results.json", "journal.json", "layers.json", "layer_003.safetensors"} <= set(written[0])
    evaluated = json.loads((runs / "results.json").read_text())["models"]["original"]["ppl"]["wikitext2"]
    assert evaluated["ppl"] == pytest.approx(outcome(runs, "alone")[2]["ppl"]["original"][0]["ppl"], rel=1e-6)
    assert (runs / "output").read_text().count("PPL original on") == 3, "evaluated once, and pruned from twice"


def test_a_run_of_several_processes_goes_on_where_it_died(runs):
    assert json.loads((runs / "found1.json").read_text())["died"] == 130
    tensors, plan, metrics = outcome(runs, "died")
    whole, wanted, _ = outcome(runs, "whole")
    assert plan == wanted and all(value.equal(tensors[name]) for name, value in whole.items()), "streamed, too"
    assert [stage["stage"] for stage in metrics["stages"]].count("plan") == 1, "nothing is done twice"
    assert not (runs / "prune_log/died/work").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 6, 7, 50])
def test_shares_are_every_window_once_in_order_and_alike_in_size(rank, total, count):
    found, sizes = [], []
    for which in range(count):
        rank(which, count)
        mine = range(total)[parallel.share(total)]
        found += mine
        sizes.append(len(mine))
    assert found == list(range(total)) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}])
def test_in_one_process_everything_is_the_identity(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rows = torch.rand(3, 2).T  # not contiguous
    assert all(function(rows) is rows for function in (parallel.summed, parallel.gathered, parallel.from_main))
    assert parallel.mine(rows).equal(rows) and parallel.main() and parallel.count() == 1 and parallel.least(3) == 3
    parallel.wait()
    parallel.leave()
    assert not parallel.started()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset=best"], "--pruning_strategy search is work for one process"),
        (["--self_samples=2"], "--self_samples is work for one process"),
        (["--distill_epochs=1"], "--distill_epochs is work for one process"),
        (["--distill_model_epochs=1"], "--distill_model_epochs is work for one process"),
        (["--distill_model_epochs=1", "--distill_last=2"], "--distill_last is work for one process"),
        (["--finetune", "--finetune_seq_len=64"], "--finetune is work for one process"),
        (["--stream=off", "--channel_importance_samples=1"], "2 processes cannot share 1 windows"),
        (["--device=cuda:0"], "--device cuda:0 is for one process"),
        (["--pruning_ratio=2"], "--pruning_ratio must lie in (0, 1)"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_what_is_refused_is_said_once_and_by_the_first_process(
    trained_dir, data_dir, tmp_path, monkeypatch, rank, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    flags = [f"--base_model={trained_dir}", f"--data_dir={data_dir}", "--save_ckpt_log_name=exp", *SMALL, *flags]
    ended = []
    monkeypatch.setattr(cli.time, "sleep", ended.append)  # in which the launcher ends this process, silent so far
    for which in (0, 1):
        rank(which)
        try:
            code = script.main(flags)
        except SystemExit as error:  # argparse's own
            code = error.code
        error = capsys.readouterr().err
        assert code == 2 and words in error and len(ended) == which
        assert error.endswith("(process 1 of 2)\n") == (which == 1)
        assert not (tmp_path / "prune_log").exists()


def test_scripts_that_are_one_process_say_so(rank, capsys, trained_dir):
    rank(0)
    assert diagnose_model.main([f"--model_path={trained_dir}"]) == 2
    assert "start it with python, without a launcher" in capsys.readouterr().err
    assert evaluate_models.main([f"--original_model={trained_dir}", "--efficiency"]) == 2
    assert "--efficiency measures one process" in capsys.readouterr().err


def test_each_process_has_a_gpu_of_its_own(rank, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rank(1)
    with pytest.raises(UsageError, match="2 processes on a machine with 1 GPUs"):
        resolve_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: None)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1") and chosen == [1, 1]
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("", "2"), ("0", "many"), (None, "2"), ("0", None)])
def test_without_a_launcher_there_is_one_process(monkeypatch, rank, size):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert parallel.count() == 1 and parallel.main() and parallel.share(5) == slice(0, 5)


def test_two_processes_train_as_one_with_twice_the_batch(runs, trained_dir, data_dir, monkeypatch):
    shared = json.loads((runs / "prune_log/tuned/metrics.json").read_text())["training"]
    weights, _ = load_checkpoint(runs / "prune_log/tuned/pytorch_model_finetuned.bin")
    (log,) = (runs / "prune_log" / "tuned").rglob("training.log")
    assert log.read_text().count("step 8 of 8  loss") == 1
    (runs / "one").mkdir()
    monkeypatch.chdir(runs / "one")
    assert test_finetuning.main([*tuning(trained_dir, data_dir), "--batch_size=4"]) == 0
    alone = json.loads(Path("prune_log/tuned/metrics.json").read_text())["training"]
    assert [step for step, _ in shared["curve"]] == [step for step, _ in alone["curve"]] == list(range(1, 9))
    for name in ("curve", "held_out"):
        flat = [value for row in shared[name] for value in (row.values() if isinstance(row, dict) else row)]
        wanted = [value for row in alone[name] for value in (row.values() if isinstance(row, dict) else row)]
        assert flat == pytest.approx(wanted, rel=1e-4)
    own, _ = load_checkpoint(Path("prune_log/tuned/pytorch_model_finetuned.bin"))
    for name, value in own.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
