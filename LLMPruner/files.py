"""Whole files and whole folders, or none; and the checks of paths that need nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from LLMPruner.errors import RunError, UsageError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary_path)`, flush it to disk, then rename it over `path`: never a half-written file."""
    remove_leftovers(path)
    temporary = _sibling(path, "tmp")
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except Exception as error:
        _raise_if_full(path, error)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(temporary_folder)`, flush its files to disk, then rename it to `path`, in the place of what was there.

    Two renames are needed where a folder is replaced. Where a process died between them, the old folder lies beside and
    `remove_leftovers` puts it back.
    """
    remove_leftovers(path)
    temporary, old = _sibling(path, "tmp"), _sibling(path, "old")
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _flush(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():  # stopped between the two renames
            old.rename(path)
        _raise_if_full(path, error)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    "No space left",
    "File too large",
    "Disk quota",
    "PytorchStreamWriter failed",
    "requested and",  # numpy's tofile, which gguf writes with
    "unexpected pos",
)  # where libraries tell no number


def _raise_if_full(path: Path, error: BaseException) -> None:
    """Raise RunError where writing failed because the disk, or what the process may write of it, is full."""
    if getattr(error, "errno", None) in _FULL or any(word in str(error) for word in _FULL_WORDS):
        raise RunError(
            f"{path} cannot be written, the disk is full or a limit reached: free some space and go on (pruning with --resume)"
        ) from error


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` that are dead left beside it; a folder that one was about to replace comes back first."""
    for leftover, process, kind in list(_siblings(path)):
        if _alive(process):
            continue
        if kind == "old" and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def restore_folder(folder: Path) -> None:
    """What dead writers left in `folder`, of whatever path, is put back or removed: for the start of a run there."""
    if folder.is_dir():
        for name in {found[1] for entry in folder.iterdir() if (found := _LEFTOVER.fullmatch(entry.name))}:
            remove_leftovers(folder / name)


_LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")


def _sibling(path: Path, kind: str) -> Path:
    """A temporary name beside `path`: it says whose it is, so that leftovers of the dead can be told."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _siblings(path: Path) -> Iterator[tuple[Path, int, str]]:
    with contextlib.suppress(FileNotFoundError):
        for entry in path.parent.iterdir():
            found = _LEFTOVER.fullmatch(entry.name)
            if found and found[1] == path.name:
                yield entry, int(found[2]), found[3]


def _alive(process: int) -> bool:
    """Whether another process of this machine has the number; also True for one that is another user's."""
    if process == os.getpid():  # it had the number before this one
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk; some file systems know no such thing for folders."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically. Raises ValueError on NaN or infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The folder or file is this process's alone while the context is open; a lock goes with its process, however that ends.

    A file need not be there yet and may be replaced: what is locked is an empty one beside it, which goes with the context.
    Raises UsageError where another process has it. File systems that know no locks are passed over.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows
        yield
        return
    place = path if path.is_dir() else path.with_name(f".{path.name}.lock")
    handle = _lock(place, path)
    try:
        yield
    finally:
        if place != path:
            place.unlink(missing_ok=True)
        os.close(handle)


def _lock(place: Path, path: Path) -> int:
    """The open file or folder `place` with a lock on it, for `path`. Raises UsageError where another process has it."""
    import fcntl

    while True:
        handle = os.open(place, os.O_RDONLY if place == path else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UsageError(f"another run is at work in {path}: wait until it is over, or choose another name") from error
        except OSError:
            pass  # a file system without locks: nothing guards against a second run there
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), place.stat()):
                return handle
        os.close(handle)  # whoever had it removed it just before: a lock on what is gone keeps nobody out


def read_json_file(path: Path, what: str) -> Any:
    """Parse a JSON file. Raises UsageError when it is missing or is not JSON."""
    if not existing_path(str(path), what).is_file():
        raise UsageError(f"{what} {path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{what} {path} is not JSON: {error}") from error


def existing_path(path: str, flag: str) -> Path:
    """`path` with the home folder filled in. Raises UsageError where the system refuses to look at it; it may not exist."""
    try:
        place = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError):
            place.stat()
    except (OSError, RuntimeError, ValueError) as error:  # name too long, no permission, no such user, a null byte
        raise UsageError(f"{flag} {path[:80]} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return place


def check_output_file(path: str, flag: str, taken: Mapping[str, Iterable[Path]] | None = None) -> Path:
    """`path` with the home folder filled in. Raises UsageError unless a file can be written there, or where it is one of those
    that are `taken`, by the flag that names them: read by the same command, or written."""
    place = existing_path(path, flag)
    for other, files in (taken or {}).items():
        if any(place.resolve() == file.resolve() for file in files):
            raise UsageError(f"{flag} {path} is a file of {other}: give another name")
    special = place.exists() and not place.is_file()  # a folder, or a device that a rename would replace
    try:
        with tempfile.TemporaryFile(dir=place.parent):  # permissions alone do not tell of file systems like /proc
            writable = not special
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"{flag} {path} cannot be written: give a file in an existing, writable folder")
    return place


def check_output_folder(path: str, flag: str) -> Path:
    """The folder to write into, not yet created. Raises UsageError where none can be made."""
    folder = existing_path(path, flag)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not path or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path!r} is not a folder, or none can be made there: choose another one")
    return folder


def require_free_space(directory: Path, needed: int, what: str) -> None:
    """Raise UsageError unless the disk of `directory` (or its nearest existing parent) has `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(
            f"{what} needs {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free: "
            "free some space, or run from a directory on a larger disk"
        )
