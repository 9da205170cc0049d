"""A run's folder: never shared, its command can be run again, its log can be read while it runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import locked
from LLMPruner.run import Run, check_experiment, start_logging, stop_logging

FLAG = "--save_ckpt_log_name"
logger = logging.getLogger("LLMPruner")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def new_run(argv=(), **options) -> Run:
    return Run(Path("prune_log/exp"), "prune.py", list(argv), seed=1, **options)


def own_handlers() -> list[logging.Handler]:
    """Those of the package's log, without pytest's."""
    return [handler for handler in logger.handlers if type(handler) in (logging.StreamHandler, logging.FileHandler)]


@pytest.mark.parametrize("name", ["exp", "llama3 25%", "实验", "a.b-c_d"])
def test_a_plain_name_is_a_folder_below_prune_log_not_yet_created(name):
    assert check_experiment(name, FLAG) == Path("prune_log", name) and not Path("prune_log").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "a\\b", "../x", "-rf", "a\0b"])
def test_a_name_that_is_a_path_or_an_option_is_refused(name):
    with pytest.raises(UsageError, match=FLAG):
        check_experiment(name, FLAG)


@pytest.mark.parametrize("blocked", ["prune_log", "prune_log/exp"])
def test_a_file_in_the_folders_place_is_refused(blocked):
    Path(blocked).parent.mkdir(exist_ok=True)
    Path(blocked).write_text("a file")
    with pytest.raises(UsageError, match=f"{blocked} is not a folder.*{FLAG}"):
        check_experiment("exp", FLAG)


def test_a_dangling_link_is_refused():
    Path("prune_log").symlink_to("nowhere")
    with pytest.raises(UsageError, match="prune_log is not a folder"):
        check_experiment("exp", FLAG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused():
    Path("prune_log").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="can be written"):
        check_experiment("exp", FLAG)


def test_runs_of_one_second_have_folders_of_their_own():
    folders = [new_run().timestamp_dir for _ in range(5)]
    assert len(set(folders)) == 5 and all(folder.is_dir() and folder.parent == Path("prune_log/exp") for folder in folders)


ARGUMENTS = ["--name", "two words", "$(touch evil)", "it's", "a;b", 'quo"te', "", "中文"]


def test_train_sh_runs_the_command_as_it_was_typed(tmp_path):
    script = tmp_path / "my folder" / "prune.py"
    script.parent.mkdir()
    script.write_text("import json, os, sys\njson.dump([os.getcwd(), sys.argv[1:]], open('typed.json', 'w'))\n")
    with Run(Path("prune_log/exp"), str(script), ARGUMENTS, seed=1) as run:
        pass
    train = run.timestamp_dir.resolve() / "train.sh"
    assert os.access(train, os.X_OK) and sys.executable in train.read_text()
    subprocess.run([train], check=True, cwd="/")
    assert json.loads(Path("typed.json").read_text()) == [str(tmp_path), ARGUMENTS]
    assert not Path("evil").exists()


def test_the_log_is_on_disk_line_by_line_while_the_run_goes_on():
    with new_run(["--x", "two words"]) as run:
        log = run.timestamp_dir / "training.log"
        logger.info("PPL pruned: 12.5 你好")
        text = log.read_text("utf-8")
        assert "PPL pruned: 12.5 你好\n" in text and "command: python prune.py --x 'two words'\n" in text
    logger.info("after the run")
    assert log.read_text("utf-8") == text, "a closed run logs no more"


def test_lines_have_a_time_and_go_to_the_terminal_too(capsys):
    handlers = start_logging()
    logger.info("hello")
    stop_logging(handlers)
    logger.info("not any more")
    out = capsys.readouterr().out
    assert out.endswith(" INFO hello\n") and out[:4].isdigit()


def test_a_failed_run_keeps_its_traceback_in_the_log_and_names_it_on_the_error():
    with pytest.raises(RunError) as caught, new_run() as run:
        raise RunError("the disk is full")
    text = (run.timestamp_dir / "training.log").read_text()
    assert "Traceback" in text and "the disk is full" in text
    assert str(run.timestamp_dir / "training.log") in caught.value.__notes__[0]
    assert not own_handlers()


def test_a_wrong_command_leaves_nothing_behind():
    with pytest.raises(UsageError), new_run():
        raise UsageError("too late to notice")
    assert not Path("prune_log").exists() and not own_handlers()


def test_a_wrong_command_leaves_earlier_runs_alone():
    with new_run() as first:
        first.save_metrics()
    with pytest.raises(UsageError), new_run():
        raise UsageError("too late to notice")
    assert sorted(path.name for path in Path("prune_log/exp").iterdir()) == sorted([first.timestamp_dir.name, "metrics.json"])


def test_a_dry_run_writes_its_log_and_nothing_else():
    with new_run(dry_run=True) as run:
        pass
    assert [path.name for path in run.timestamp_dir.iterdir()] == ["training.log"]


def test_stages_record_seconds_memory_and_what_the_body_adds():
    with new_run() as run:
        with run.stage("load"):
            pass
        with run.stage("evaluate") as record:
            record["ppl"] = 3.5
        run.save_metrics()
    saved = json.loads((run.dir / "metrics.json").read_text())
    assert [stage["stage"] for stage in saved["stages"]] == ["load", "evaluate"] and saved["seed"] == 1
    assert saved["stages"][1]["ppl"] == 3.5
    assert all(stage["seconds"] >= 0 and 0.001 < stage["peak_memory_gb"] < 100 for stage in saved["stages"])
    log = (run.timestamp_dir / "training.log").read_text()
    assert log.count("stage load: start") == 1 and "stage evaluate: 0.0 s, peak memory" in log


def test_a_stage_that_fails_is_not_recorded_as_done():
    with pytest.raises(ValueError), new_run() as run, run.stage("load"):
        raise ValueError("no")
    assert run.stages == []


def test_the_description_has_the_command_and_one_setting_a_line():
    with new_run(["--pruning_ratio", "0.25"]) as run:
        run.describe({"pruning_ratio": 0.25, "repair": "none"})
    lines = (run.dir / "description.txt").read_text().splitlines()
    assert lines[0] == "command: python prune.py --pruning_ratio 0.25" and {"pruning_ratio: 0.25", "repair: none"} <= set(lines)


def test_a_run_finds_its_folder_as_a_dead_one_should_have_left_it():
    """A folder that one was about to replace comes back, half-written files go, and what a living process writes stays."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = Path("prune_log/exp")
    (folder / f".hf.{dead.pid}.old").mkdir(parents=True)
    (folder / f".hf.{dead.pid}.tmp").mkdir()
    (folder / f".pytorch_model.bin.{dead.pid}.tmp").write_text("half")
    (folder / f".metrics.json.{os.getppid()}.tmp").write_text("half")
    before = {path.name for path in folder.iterdir()}
    with locked(folder), pytest.raises(UsageError, match="exp"), new_run():  # on another machine the writer looks dead, too
        pytest.fail("another run is at work here")
    with new_run(dry_run=True) as run:
        pass
    assert {path.name for path in folder.iterdir()} == before | {run.timestamp_dir.name}
    shutil.rmtree(run.timestamp_dir)
    with new_run() as run:
        kept = {"hf", f".metrics.json.{os.getppid()}.tmp", run.timestamp_dir.name}
        assert {path.name for path in folder.iterdir() if path.name != "train.sh"} == kept


def test_the_memory_of_a_stage_is_asked_of_the_device_of_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr("LLMPruner.run.reset_peak_memory", lambda device: asked.append(device))
    monkeypatch.setattr("LLMPruner.run.peak_memory", lambda device: asked.append(device) or 2_000_000_000)
    with new_run(device="cuda:1") as run, run.stage("load"):
        pass
    assert asked == ["cuda:1"] * 2 and run.stages[0]["peak_memory_gb"] == 2
