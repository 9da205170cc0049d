"""Local corpus files as rows, of text or of chats: .txt, .jsonl, .parquet; what is neither is refused with file and line."""

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
HALF_CHARACTER = "holds half a character (a lone surrogate): write the text anew as UTF-8"
CHAT_COLUMNS = ("messages", "instruction", "input", "output")
JSON_KINDS = {list: "a list", dict: "an object", str: "a string", bool: "true or false", int: "a number", float: "a number"}


def read_rows(path: Path, column: str) -> Sequence[str | None]:
    """The rows of a file: the lines of a .txt, or the texts of a table, under `column` or a usual name. Raises UsageError."""
    try:
        if path.suffix.lower() == ".txt":
            lines = io.StringIO(_decoded(path.read_bytes(), path), newline=None)  # None: \r\n ends a line as well
            return [line if line.strip() else "" for line in (line.lstrip(MARK) for line in lines)]
        return _JsonTexts(path, column) if path.suffix.lower() == ".jsonl" else _read_parquet(path, column)
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
    chats = " (its rows are chats, which are for fine-tuning alone)" * holds_chats(names)
    return UsageError(f"{where} has no text column: found {', '.join(names) or 'none'}, want {column}{chats}")


class JsonLines(Sequence[dict[str, Any]]):
    """The rows of a .jsonl file as objects, read when they are asked for: in memory is only where each begins."""

    def __init__(self, path: Path, want: str) -> None:
        self.path, self.want, self.starts, self.numbers, place = path, want, array("Q"), array("Q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self.starts.append(place)
                    self.numbers.append(number)
                place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = _decoded(file.readline(), self.path, self.numbers[index])
        want = f"write {self.want} on each line"
        try:
            row = json.loads(line.lstrip(MARK))
        except (ValueError, RecursionError) as error:
            raise self.wrong(index, f"is not JSON ({getattr(error, 'msg', error)}): {want}") from error
        if not isinstance(row, dict):
            raise self.wrong(index, f"is {JSON_KINDS.get(type(row), 'null')}, not an object: {want}")
        return row

    def where(self, index: int) -> str:
        """A row as a sentence begins with it."""
        return f"{self.path}, line {self.numbers[index]},"

    def wrong(self, index: int, reason: str) -> UsageError:
        """What to raise for a row: `reason` goes on after "line 3"."""
        return _unreadable(self.path, f"line {self.numbers[index]} {reason}")


class _JsonTexts(Sequence[str | None]):
    """One column of a .jsonl file."""

    def __init__(self, path: Path, column: str) -> None:
        self.rows, self.column = JsonLines(path, f'{{"{column}": "..."}}'), column
        if self.rows:
            self.column = _text_column(list(self.rows[0]), column, self.rows.where(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | None:
        row = self.rows[index]
        if self.column not in row:  # null would say that there is none
            raise _no_column(self.rows.where(index), list(row), self.column)
        text = row[self.column]
        if not isinstance(text, str | None):
            raise self.rows.wrong(index, f"has {JSON_KINDS[type(text)]} as its {self.column}: write a string there, or null")
        if text is not None and HALF.search(text):
            raise self.rows.wrong(index, HALF_CHARACTER)
        return text


class Table(Sequence[dict[str, Any]]):
    """The rows of a table of `datasets`, which stays on disk, as objects; `what` begins the sentence about a wrong one."""

    def __init__(self, table: Any, what: str) -> None:
        self.table, self.what = table, what

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[index]

    def wrong(self, index: int, reason: str) -> UsageError:
        """What to raise for a row: `reason` goes on after "row 3"."""
        return UsageError(f"{self.what}: row {index + 1} {reason}")


def column_names(path: Path) -> Sequence[str]:
    """The columns of a table, of a .jsonl those of its first row; a .txt has none. Raises UsageError."""
    try:
        if path.suffix.lower() == ".jsonl":
            rows = JsonLines(path, '{"text": "..."}')
            return list(rows[0]) if rows else []
        return _parquet_schema(path)[0].names if path.suffix.lower() == ".parquet" else []
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error


def holds_chats(names: Sequence[str]) -> bool:
    """Whether a table with these columns is one of chats."""
    return "messages" in names or {"instruction", "output"} <= set(names)


def read_chat_rows(path: Path) -> JsonLines | Table:
    """The rows of a file of chats, as objects. Raises UsageError."""
    if path.suffix.lower() == ".txt":
        raise _unreadable(path, "a .txt has no chats: write a .jsonl or .parquet file with messages, or instruction and output")
    try:
        if path.suffix.lower() == ".jsonl":
            return JsonLines(path, '{"messages": [...]}')
        names = [name for name in CHAT_COLUMNS if name in column_names(path)]
        return Table(_parquet_table(path, names), f"{path} is not a readable {path.suffix.lower()} file")
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error


def _parquet_schema(path: Path) -> tuple[Any, int]:
    """The schema of the table, and how many rows it has."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise _unreadable(path, _first_line(error)) from error


def _read_parquet(path: Path, column: str) -> Sequence[str | None]:
    """One column of the table, which stays on disk."""
    import pyarrow

    schema, rows = _parquet_schema(path)
    name = _text_column(schema.names, column, str(path))
    kind = schema.field(schema.names.index(name)).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise _unreadable(path, f"its column {name} holds {str(kind)[:60]}: write strings there")
    return _parquet_table(path, [name])[name] if rows else []


def _parquet_table(path: Path, names: list[str]) -> Any:
    """Columns of the table, which stays on disk; their text is UTF-8."""
    import datasets

    if "::" in str(path.absolute()):
        raise _unreadable(path, "datasets takes '::' in a path for an address: rename the file or its folder")
    try:
        place = glob.escape(str(path.absolute()))
        table = datasets.load_dataset("parquet", data_files=place, split="train", columns=names)
        for name in names:
            table.data.column(name).validate(full=True)  # that it is UTF-8
    except Exception as error:  # datasets raises many kinds for a malformed file
        raise _unreadable(path, _first_line(error.__cause__ or error)) from error
    return table


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
