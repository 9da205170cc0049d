"""The documents hold: every command of both READMEs parses, and the two READMEs have the same commands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def commands(document: str) -> list[list[str]]:
    """Every `python script.py ...` in a fenced bash block, continuation lines joined."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("${ratio}", "25"), comments=True) for line in lines if line.strip().startswith("python ")]


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md"])
def test_every_command_parses(document):
    found = [command for command in commands(document) if command[1].endswith(".py")]
    assert len(found) >= 15
    for _, script, *flags in found:
        importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(flags)


def test_both_readmes_show_the_same_commands():
    assert commands("README.md") == commands("README.zh-CN.md")


def test_no_marker_is_left_in_a_document():
    for document in ("README.md", "README.zh-CN.md", "CLAUDE.md"):
        assert "{{" not in (ROOT / document).read_text(encoding="utf-8")
