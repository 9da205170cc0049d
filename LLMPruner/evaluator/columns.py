"""Text in columns of a terminal, where Chinese characters take two and combining marks none."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

GAP = " | "


def width(text: str) -> int:
    """Columns on a terminal."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most `columns`, broken at blanks where there are any. What is not printable shows as U+FFFD."""
    lines = []
    for paragraph in text.expandtabs(4).splitlines() or [""]:
        line = ""
        for piece in re.split(r"(\s+)", "".join(char if char.isprintable() else "\ufffd" for char in paragraph)):
            if width(piece) <= columns < width(line + piece):
                lines.append(line.rstrip())
                line = piece.lstrip()
                continue
            for char in piece:
                if width(line + char) > columns:
                    lines.append(line.rstrip())
                    line = ""
                line += char
        lines.append(line.rstrip())
    return lines


def beside(cells: Sequence[str], columns: int) -> list[str]:
    """Lines with every text in a column of its own, all of the same width, `columns` in all."""
    each = max(1, (columns - len(GAP) * (len(cells) - 1)) // len(cells))
    rows = zip_longest(*(wrapped(cell, each) for cell in cells), fillvalue="")
    return [GAP.join(line + " " * (each - width(line)) for line in row).rstrip() for row in rows]
