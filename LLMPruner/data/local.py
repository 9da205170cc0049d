"""Local corpus files as rows of text: .txt, .jsonl, .parquet; what is no text is refused with the file and the line."""

from __future__ import annotations

import codecs
import glob
import io
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from LLMPruner.errors import UsageError

SUFFIXES = (".txt", ".parquet", ".jsonl")  # in capitals too
MARK = "\ufeff"  # the byte-order mark, which some editors write before a text and which is none of it
HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON's escapes can say it, UTF-8 cannot
JSON_KINDS = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}


def read_rows(path: Path, column: str) -> Sequence[str | None]:
    """The rows of a file: the lines of a .txt, or the texts of a table, under `column` or a usual name. Raises UsageError."""
    try:
        if path.suffix.lower() == ".txt":
            lines = io.StringIO(_decoded(path.read_bytes(), path), newline=None)  # None: \r\n ends a line as well
            return [line if line.strip() else "" for line in (line.lstrip(MARK) for line in lines)]
        return _JsonLines(path, column) if path.suffix.lower() == ".jsonl" else _read_parquet(path, column)
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error


def _unreadable(path: Path, reason: object) -> UsageError:
    return UsageError(f"{path} is not a readable {path.suffix.lower()} file: {reason}")


def _decoded(data: bytes, path: Path, line: int = 1) -> str:
    """Lines of a text file, from number `line` on. Raises UsageError where they are not UTF-8."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide or b"\0" in data:
        line += 0 if wide else data.count(b"\n", 0, data.index(b"\0"))
        raise _unreadable(path, f"line {line} is UTF-16, or no text at all: save the file as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise _unreadable(path, f"line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from error


def _text_column(names: Sequence[str], column: str, where: str) -> str:
    for candidate in (column, "text", "sentence"):
        if candidate in names:
            return candidate
    raise _no_column(where, names, column)


def _no_column(where: str, names: Sequence[str], column: str) -> UsageError:
    return UsageError(f"{where} has no text column: found {', '.join(names) or 'none'}, want {column}")


class _JsonLines(Sequence[str | None]):
    """The rows of a .jsonl file, read when they are asked for: in memory is only where each begins."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.starts, self.numbers, place = path, column, array("Q"), array("Q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self.starts.append(place)
                    self.numbers.append(number)
                place += len(line)
        if self.starts:
            self.column = _text_column(list(self._object(0)), column, self._where(0))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> str | None:
        row = self._object(index)
        if self.column not in row:  # null would say that there is none
            raise _no_column(self._where(index), list(row), self.column)
        text = row[self.column]
        if not isinstance(text, str | None):
            raise self._wrong(index, f"has {JSON_KINDS[type(text)]} as its {self.column}: write a string there, or null")
        if text is not None and HALF.search(text):
            raise self._wrong(index, "holds half a character (a lone surrogate): write the text anew as UTF-8")
        return text

    def _where(self, index: int) -> str:
        return f"{self.path}, line {self.numbers[index]},"

    def _wrong(self, index: int, reason: str) -> UsageError:
        return _unreadable(self.path, f"line {self.numbers[index]} {reason}")

    def _object(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = _decoded(file.readline(), self.path, self.numbers[index])
        want = f'write {{"{self.column}": "..."}} on each line'
        try:
            row = json.loads(line.lstrip(MARK))
        except (ValueError, RecursionError) as error:
            raise self._wrong(index, f"is not JSON ({getattr(error, 'msg', error)}): {want}") from error
        if not isinstance(row, dict):
            raise self._wrong(index, f"is {JSON_KINDS.get(type(row), 'null')}, not an object: {want}")
        return row


def _read_parquet(path: Path, column: str) -> Sequence[str | None]:
    """One column of the table, which stays on disk."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise _unreadable(path, _first_line(error)) from error
    name = _text_column(schema.names, column, str(path))
    kind = schema.field(schema.names.index(name)).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise _unreadable(path, f"its column {name} holds {str(kind)[:60]}: write strings there")
    if rows == 0:
        return []
    if "::" in str(path.absolute()):
        raise _unreadable(path, "datasets takes '::' in a path for an address: rename the file or its folder")
    try:
        place = glob.escape(str(path.absolute()))
        table = datasets.load_dataset("parquet", data_files=place, split="train", columns=[name])
        table.data.column(name).validate(full=True)  # that it is UTF-8
    except Exception as error:  # datasets raises many kinds for a malformed file
        raise _unreadable(path, _first_line(error.__cause__ or error)) from error
    return table[name]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
