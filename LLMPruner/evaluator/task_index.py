"""lm-evaluation-harness's index of tasks: what is known by name, and what is given as a file. lm_eval is imported when used."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from LLMPruner.errors import UsageError, one_line
from LLMPruner.files import existing_path


def version() -> str:
    """The installed lm_eval's."""
    return importlib.metadata.version("lm_eval")


@lru_cache(maxsize=2)
def manager(defaults: bool, folder: str | None = None) -> Any:
    """lm_eval's index of its tasks, and of those in a folder; without `defaults` an empty one, for tasks that are files, in no
    time."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_defaults=defaults, include_path=folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back lm_eval's notices: of defaults it takes, and that a model in memory has no path."""
    theirs = logging.getLogger("lm_eval")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def is_path(name: str) -> bool:
    """Whether a task is given as a file."""
    return name.endswith((".yaml", ".yml"))


def _group_in(path: Path) -> str | None:
    """The group that a YAML describes, None for a task; nothing of it is run. Raises UsageError for what is no YAML."""
    import yaml

    try:
        found = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--tasks {path} is no YAML: {one_line(error)[:200]}") from error
    entries = found.value if isinstance(found, yaml.MappingNode) else []
    return next((value.value for key, value in entries if key.value == "group" and isinstance(value.value, str)), None)


@contextmanager
def index(names: Sequence[str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """lm_eval's index, and what it knows each of the names and paths by.

    Tasks are known by path. Groups, which may list built-in tasks, are not (lm_eval 0.4.13 takes their list of tasks for their
    name): a folder of links to them is indexed, for their own folder may be large.
    """
    specs = {name: str(existing_path(name, "--tasks")) if is_path(name) else name for name in names}
    groups = {name: group for name in specs if is_path(name) and (group := _group_in(Path(specs[name])))}
    if not groups:
        yield manager(not all(map(is_path, names))), specs
        return
    with tempfile.TemporaryDirectory(prefix="llmpruner.") as folder:
        for place, name in enumerate(groups):
            Path(folder, f"{place}.yaml").symlink_to(Path(specs[name]).resolve())
        yield manager(True, folder), specs | groups
