"""Rows of text files: an object a line, a JSON list of objects, or separated values."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_cli.data.records import NUMBERS, Cell, Row
from dpo_cli.data.rows import file_types, streams
from dpo_cli.data.rows.fields import distinct
from dpo_cli.data.rows.json_lists import DECODER, Window, as_row, members
from dpo_cli.data.rows.streams import head_of, numbered_lines, open_bytes, too_long
from dpo_cli.errors import UserError


def json_lines(path: Path) -> Iterator[Row]:
    """Read one JSON object per line; blank lines are passed over."""
    return rows_of_lines(path, _decoded)


def rows_of_lines(path: Path, decoded: Callable[[bytes, str], Row]) -> Iterator[Row]:
    """Read one row per line; blank lines are passed over.

    Args:
        path: The file.
        decoded: Makes a row of a line without the blanks around it, and of its place.
    """
    with open_bytes(path) as file:
        for number, line in numbered_lines(file, path):
            origin = f"{path}:{number}"
            if line is None:
                yield Row(origin, None, too_long())
            elif text := line.strip():
                yield decoded(text, origin)


def _decoded(line: bytes, origin: str) -> Row:
    """Decode one line of JSON."""
    try:
        return as_row(DECODER.decode(line.decode("utf-8")), origin)
    except UnicodeDecodeError as error:
        return Row(origin, None, f"the row is not UTF-8: byte {line[error.start]:#04x}")
    except json.JSONDecodeError as error:
        return Row(origin, None, f"the row is not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return Row(origin, None, "the row is not valid JSON: it is nested too deeply")
    except ValueError as error:
        return Row(origin, None, f"the row is not valid JSON: {error}")


def json_list(path: Path) -> Iterator[Row]:
    """Read a JSON list of objects, or one object per line where the file starts with an object."""
    with open_bytes(path) as file:
        window = Window(file, path)
        first = window.character()
        if first == "[":
            yield from members(window, path)
            return
        if first != "{" or _spans_lines(window):
            raise UserError(
                "the file is not a JSON list", f"{path}:1", "write a list of objects, or one object per line"
            )
    yield from json_lines(path)


def _spans_lines(window: Window) -> bool:
    """Tell whether a file is a single object over several lines, rather than an object a line."""
    line = window.line
    with contextlib.suppress(UserError):
        window.value()
    return window.line > line


def separated(path: Path, delimiter: str) -> Iterator[Row]:
    """Read separated values, of which the first line names the columns."""
    columns: list[str] | None = None
    delimiter = file_types.separator_of(head_of(path), delimiter)
    with open_bytes(path) as file:
        for origin, fields, problem in _records(_CsvLines(file, path), path, delimiter):
            if columns is None:
                if problem:
                    hint = "name the columns in the first line, separated and quoted like the others"
                    raise UserError(problem.replace("the row", "the header", 1), origin, hint)
                columns = distinct(fields, origin)
            elif problem:
                yield Row(origin, None, problem)
            elif len(fields) != len(columns):
                yield Row(origin, None, f"the row has {len(fields)} fields where the header has {len(columns)}")
            else:
                yield Row(origin, _with_numbers(dict(zip(columns, map(Cell, fields), strict=True))))


def _records(lines: _CsvLines, path: Path, delimiter: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield where each record begins, its fields, and what is wrong with it; blank lines are passed over."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        origin = f"{path}:{lines.number}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield origin, [], lines.problem or f"the row is not valid CSV: {str(error).partition(' - ')[0]}"
            lines.give_up()
            continue
        if fields:
            yield origin, fields, lines.problem
        lines.take()


class _CsvLines(Iterator[str]):
    """The lines of a file as `csv.reader` asks for them, of which those of a broken record come once more.

    Where quotes are broken, nobody knows how far the record goes: a quote that is not closed swallows what follows.
    So only the line on which it begins is given up.

    Attributes:
        number: The line on which the record begins that is being read.
        problem: What keeps the text of that record from being read.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self.number, self.problem = 1, ""
        self._lines = numbered_lines(file, path)
        self._again: deque[bytes | None] = deque()
        self._record: list[bytes | None] = []
        self._num_bytes = 0

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)[1]
        self._record.append(line)
        self._num_bytes += len(line or b"")
        if line is None or self._num_bytes > streams.MAX_ROW_BYTES:
            self.problem = too_long()
            raise csv.Error(self.problem)
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.problem = f"the row is not UTF-8: byte {line[error.start]:#04x}"
            return line.decode("utf-8", "replace")

    def take(self) -> None:
        """Begin the next record behind this one."""
        self.number += len(self._record)
        self._record, self._num_bytes, self.problem = [], 0, ""

    def give_up(self) -> None:
        """Begin the next record on the second line of this one, which is broken."""
        self._again.extendleft(reversed(self._record[1:]))
        del self._record[1:]
        self.take()


def _with_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Read the columns that hold numbers, which CSV has as text; what is no number stays text."""
    for name in NUMBERS:
        text = values.get(name)
        if text is None or "_" in text:  # `1_000` is a number to Python alone.
            continue
        with contextlib.suppress(ValueError):
            values[name] = float(text) if text.strip() else None
    return values
