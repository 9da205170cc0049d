"""The documents hold: every command of each parses, and its translation has the same commands."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path.name for path in ROOT.glob("*.md"))
TRANSLATED = [name.replace(".zh-CN", "") for name in DOCUMENTS if ".zh-CN" in name]


def commands(document: str) -> list[list[str]]:
    """Every `python script.py ...` in a fenced bash block, continuation lines joined."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.replace("${ratio}", "25"), comments=True) for line in lines if line.strip().startswith("python ")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document):
    found = [command for command in commands(document) if command[1].endswith(".py") and "/" not in command[1]]
    assert len(found) >= 15 or not document.startswith("README")
    for _, script, *flags in found:
        importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(flags)


@pytest.mark.parametrize("document", TRANSLATED)
def test_both_languages_show_the_same_commands(document):
    translation = document.replace(".md", ".zh-CN.md")
    assert commands(document) == commands(translation) != []
    assert f"]({translation})" in (ROOT / document).read_text(encoding="utf-8")
    assert f"]({document})" in (ROOT / translation).read_text(encoding="utf-8")


def test_no_marker_is_left_in_a_document():
    for document in DOCUMENTS:
        assert "{{" not in (ROOT / document).read_text(encoding="utf-8")
