"""Files and folders appear whole or not at all, whenever a process dies; paths are checked before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from LLMPruner.errors import RunError, UsageError
from LLMPruner.files import (
    check_output_file,
    check_output_folder,
    existing_path,
    locked,
    read_json_file,
    remove_leftovers,
    require_free_space,
    restore_folder,
    write_atomically,
    write_folder_atomically,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def writes(text: str):
    """A writer of a folder with one file."""
    return lambda folder: (folder / "config.json").write_text(text)


def test_a_failing_writer_leaves_no_partial_file_and_the_old_one_whole(tmp_path):
    path = tmp_path / "model.bin"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new ü")
    assert path.read_text("utf-8") == "new ü" and list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    path = tmp_path / "hf"
    for text in ("old", "new"):
        write_folder_atomically(path, writes(text))
        assert content(path) == {"config.json": text} and names(tmp_path) == {"hf"}
    (path / "stale.txt").write_text("of the old folder")
    write_folder_atomically(path, writes("newer"))
    assert content(path) == {"config.json": "newer"}


def test_a_failing_writer_of_a_folder_leaves_the_old_one(tmp_path):
    path = tmp_path / "hf"
    write_folder_atomically(path, writes("old"))

    def fail(temporary: Path) -> None:
        (temporary / "config.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder_atomically(path, fail)
    assert content(path) == {"config.json": "old"} and names(tmp_path) == {"hf"}


def test_an_interrupt_between_the_two_renames_gives_the_old_folder_back(tmp_path, monkeypatch):
    path, rename = tmp_path / "hf", Path.rename
    write_folder_atomically(path, writes("old"))

    def interrupted(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(path, writes("new"))
    assert content(path) == {"config.json": "old"} and names(tmp_path) == {"hf"}


KILLED = """
import os, signal, sys
from pathlib import Path
from LLMPruner.files import write_folder_atomically

rename = Path.rename
def killed(self, target):
    if self.name.endswith(".tmp"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
write_folder_atomically(Path(sys.argv[1]), lambda folder: (folder / "config.json").write_text("new"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("found", ["remove_leftovers", "restore_folder", "write_folder_atomically"])
def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path, found):
    path = tmp_path / "hf"
    write_folder_atomically(path, writes("old"))
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parent.parent)
    assert process.returncode < 0 and not path.exists(), "killed where the folder is missing, or this test proves nothing"
    assert {"old"} == {(place / "config.json").read_text() for place in tmp_path.iterdir() if place.suffix == ".old"}
    if found == "write_folder_atomically":
        with pytest.raises(OSError, match="disk full"):
            write_folder_atomically(path, lambda _: (_ for _ in ()).throw(OSError("disk full")))
    elif found == "remove_leftovers":
        remove_leftovers(path)
    else:
        restore_folder(tmp_path)
    assert content(path) == {"config.json": "old"} and names(tmp_path) == {"hf"}


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_kept(tmp_path, dead):
    path, living = tmp_path / "hf", os.getppid()
    path.mkdir()
    for process in (dead, living):
        (tmp_path / f".hf.{process}.tmp").mkdir()
        (tmp_path / f".hf.{process}.old").mkdir()
    (tmp_path / f".hf.{dead}.tmp" / "file").write_text("half")
    others = {f".model.bin.{dead}.tmp", ".hf.backup.tmp", f"hf.{dead}.tmp", ".hf.1"}
    for name in others:
        (tmp_path / name).write_text("of another path, or of nobody's")
    remove_leftovers(path)
    assert names(tmp_path) == {"hf", f".hf.{living}.tmp", f".hf.{living}.old"} | others
    assert not list(path.iterdir()), "the old folder is not put into the new one"


def test_a_folder_whose_replacement_a_living_process_writes_is_left_alone(tmp_path):
    (tmp_path / f".hf.{os.getppid()}.old").mkdir()
    remove_leftovers(tmp_path / "hf")
    restore_folder(tmp_path)
    assert names(tmp_path) == {f".hf.{os.getppid()}.old"}


def test_the_leftovers_of_every_path_in_a_folder_are_cleared(tmp_path, dead):
    (tmp_path / f".a.b.{dead}.old").mkdir()
    (tmp_path / f".model.bin.{dead}.tmp").write_text("half")
    (tmp_path / "kept.txt").write_text("")
    restore_folder(tmp_path)
    assert names(tmp_path) == {"a.b", "kept.txt"}
    restore_folder(tmp_path / "nowhere")


def test_a_writer_clears_what_a_dead_one_of_the_same_file_left(tmp_path, dead):
    (tmp_path / f".a.txt.{dead}.tmp").write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert content(tmp_path) == {"a.txt": "whole"}


def test_what_a_dead_process_with_this_ones_number_left_stands_in_nobodys_way(tmp_path):
    """In a container every run may have the same number."""
    for kind in ("tmp", "old"):
        (tmp_path / f".hf.{os.getpid()}.{kind}").mkdir()
    (tmp_path / f".hf.{os.getpid()}.old" / "config.json").write_text("old")
    write_folder_atomically(tmp_path / "hf", writes("new"))
    assert content(tmp_path / "hf") == {"config.json": "new"} and names(tmp_path) == {"hf"}


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"ppl": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_missing_or_not_json_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="--config .*a.json (does not exist|is not JSON)"):
        read_json_file(path, "--config")


def test_json_comes_back_as_it_was_written(tmp_path):
    data = {"ü": [1, 2.5, None, "x"]}
    write_json(tmp_path / "a.json", data)
    assert read_json_file(tmp_path / "a.json", "--config") == data


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~no-such-user-here/model"])
def test_a_path_that_the_system_refuses_is_one_sentence_with_its_flag(path):
    with pytest.raises(UsageError, match="--model_path .* cannot be read"):
        existing_path(path, "--model_path")


def test_a_path_may_be_missing_and_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert existing_path("~/nowhere", "--x") == tmp_path / "nowhere"


def test_a_file_to_write_is_checked_without_being_touched(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        check_output_file(str(tmp_path / name), "--output")
    assert content(tmp_path) == {"old.json": "old"}
    below = tmp_path / "nowhere" / "a.json", tmp_path / "old.json" / "a.json"
    for wrong in (tmp_path, *below, "/dev/null", "/proc/a.json"):
        with pytest.raises(UsageError, match="--output .* cannot be (written|read: Not a directory)"):
            check_output_file(str(wrong), "--output")


def test_a_folder_to_write_into_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    for right in (tmp_path, tmp_path / "not" / "yet"):
        assert check_output_folder(str(right), "--output") == right
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", ""):
        with pytest.raises(UsageError, match="--output .* (is not a folder|cannot be read: Not a directory)"):
            check_output_folder(str(wrong), "--output")
    assert names(tmp_path) == {"file"}


def test_free_space_is_required_of_the_nearest_existing_folder(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or usage(10, 5, 5_000_000_000))
    require_free_space(tmp_path / "not" / "yet", 5_000_000_000, "the checkpoint")
    assert asked == [tmp_path]
    with pytest.raises(UsageError, match=r"the checkpoint needs 5\.1 GB and .* has 5\.0 GB free"):
        require_free_space(tmp_path, 5_100_000_000, "the checkpoint")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        OSError("100000 requested and 25000 written"),
    ],
)
@pytest.mark.parametrize("write", [write_atomically, write_folder_atomically])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, write, error):
    def full(_):
        raise error

    with pytest.raises(RunError, match="the disk is full"):
        write(tmp_path / "model.bin", full)
    assert not any(tmp_path.iterdir())


def test_a_limit_of_the_files_size_is_one_sentence_too(tmp_path):
    """The real thing, in a process of its own: torch and safetensors say it otherwise than Python."""
    code = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from LLMPruner.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
big = {"a": torch.zeros(1 << 20)}
plain = lambda path: path.write_bytes(bytes(1 << 22))
for write in (lambda path: torch.save(big, path), lambda path: save_file(big, path), plain):
    try:
        write_atomically(Path(sys.argv[1], "model"), write)
    except RuntimeError as error:
        print(type(error).__name__, "disk is full" in str(error))
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "RunError True\n" * 3, run.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", "new.json", "old.json"])
def test_what_is_locked_is_one_processs_alone(tmp_path, name):
    """A folder, or a file that is there or not yet, and that is written anew meanwhile."""
    (tmp_path / "old.json").write_text("old")
    path = tmp_path / name
    for _ in range(2):
        with locked(path):
            if name != ".":
                write_text(path, "new")
            with pytest.raises(UsageError, match=f"another run is at work in {path}: wait"), locked(path):
                pass
            code = f"from pathlib import Path; from LLMPruner.files import locked; locked(Path({str(path)!r})).__enter__()"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
            assert "another run is at work" in run.stderr
            with locked(tmp_path / "other.json"):
                pass
        assert names(tmp_path) == {"old.json"} | ({name} - {"."}), "nothing is left behind"


def test_a_lock_of_the_dead_is_nobodys(tmp_path):
    (tmp_path / ".r.json.lock").touch()
    with locked(tmp_path / "r.json"), pytest.raises(UsageError), locked(tmp_path / "r.json"):
        pass
    assert names(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_lock_that_its_owner_removes_just_before_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """Or two would hold it: one the file that is gone, and one the next."""
    import fcntl

    path, flock = tmp_path / "r.json", fcntl.flock

    def late(handle, how):
        (tmp_path / ".r.json.lock").unlink()  # by the owner, who parts
        monkeypatch.setattr(fcntl, "flock", flock)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path), pytest.raises(UsageError, match="another run"), locked(path):
        pass
    assert names(tmp_path) == set()
