"""The two ways a command can end badly, each carrying one sentence for the user."""

from __future__ import annotations


class UsageError(ValueError):
    """The command was wrong: exit code 2, and nothing was changed on disk."""


class DamagedError(UsageError):
    """The file named is there, is of the right kind, and is damaged: for a diagnosis that is a finding."""


class RunError(RuntimeError):
    """The command was right and the run failed: exit code 1."""


def one_line(error: BaseException) -> str:
    """What a library's error says, for a sentence of ours."""
    return " ".join(str(error).split())
