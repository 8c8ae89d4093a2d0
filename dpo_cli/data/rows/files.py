"""A data file becomes rows, each with the line or the number it came from.

A row that cannot be read does not end the reading: it travels on as a row with a problem, so that all problems of a
file are found in one pass. What makes the rest of a file unreadable is a `UserError`. No file is ever whole in memory.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.data.records import NUMBERS, Cell, Row
from dpo_cli.data.rows import file_types, streams
from dpo_cli.data.rows.fields import printable
from dpo_cli.data.rows.json_lists import DECODER, Window, as_row, members
from dpo_cli.data.rows.streams import COMPRESSIONS, head_of, is_packed, numbered_lines, open_bytes, too_long
from dpo_cli.errors import UserError
from dpo_cli.system.bounds import bounded_memory

BATCH_ROWS = 1024
"""Rows that are taken out of a file of columns at once."""

MAX_BATCH_BYTES = 1 << 30
"""The memory that so many rows may take: what a file says of its sizes need not be so."""

MAX_ROWS_PER_BYTE, FREE_ROWS = 100, 1_000_000
"""A file of columns holds no more rows for its size: one that says so repeats a few for ever."""

_WITH_OBJECTS = re.compile(r"arrow\.json|struct<")
"""Arrow's names for the types of columns that hold objects, at whatever depth, or JSON."""

_REASON_LENGTH = 200
"""How much is shown of what Arrow says of a file; it may name what stands there."""

Reader = Callable[[Path], Iterator[Row]]


def reader_of(path: Path) -> Reader | None:
    """Return what reads a file, by its ending; None where it is not that of a data file."""
    endings = [suffix.lower() for suffix in path.suffixes[-2:]]
    return READERS.get("".join(endings)) or READERS.get(endings[-1]) if endings else None


def reader_for(path: Path) -> Reader | None:
    """Return what reads a file that there is: by its ending, or where that says nothing by its first bytes."""
    if (reader := reader_of(path)) or path.suffix.lower() not in _SAYING_NOTHING:
        return reader
    return _by_content(path, head_of(path))


def _read(path: Path, named: Reader) -> Iterator[Row]:
    """Read a file as what its first bytes are, where that is known, or else as what its ending says."""
    head = head_of(path)
    reader = _by_content(path, head)
    if reader is _json and not _is_rather_json(head, named):
        reader = named
    yield from (reader or named)(path)


def _is_rather_json(head: bytes, named: Reader) -> bool:
    """Tell whether what begins like JSON is to be read as that, and not as what the file's ending says."""
    if named is _json_lines:
        return file_types.is_json_list(head)
    return named is _json or file_types.is_json_object_first(head)


def _by_content(path: Path, head: bytes) -> Reader | None:
    """Return what reads a file that begins so; None where its first bytes do not tell.

    Raises:
        UserError: They are those of something that is no data file.
    """
    if file_types.is_parquet(head) or file_types.is_arrow(head):
        if is_packed(path):
            raise UserError("the file of columns is compressed as a whole", str(path), "unpack it")
        return _parquet if file_types.is_parquet(head) else _arrow
    file_types.check_content(head, path)
    return _json if file_types.starts_as_json(head) else None


def _json_lines(path: Path) -> Iterator[Row]:
    """Read one JSON object per line; blank lines are passed over."""
    with open_bytes(path) as file:
        for number, line in numbered_lines(file, path):
            origin = f"{path}:{number}"
            if line is None:
                yield Row(origin, None, too_long())
            elif text := line.strip():
                yield _decoded(text, origin)


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


def _json(path: Path) -> Iterator[Row]:
    """Read a JSON list of objects, or one object per line where the file starts with an object."""
    with open_bytes(path) as file:
        window = Window(file, path)
        first = window.character()
        if first == "[":
            yield from members(window, path)
            return
        if first != "{" or _spans_lines(window):
            raise UserError("the file is not a JSON list", f"{path}:1", "write a list of objects, or an object a line")
    yield from _json_lines(path)


def _spans_lines(window: Window) -> bool:
    """Tell whether a file is a single object over several lines, rather than an object a line."""
    line = window.line
    with contextlib.suppress(UserError):
        window.value()
    return window.line > line


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    """Read separated values, of which the first line names the columns."""
    columns: list[str] | None = None
    delimiter = file_types.separator_of(head_of(path), delimiter)
    with open_bytes(path) as file:
        for origin, fields, problem in _records(_CsvLines(file, path), path, delimiter):
            if columns is None:
                if problem:
                    hint = "the first line names the columns, separated and quoted as the others are"
                    raise UserError(problem.replace("the row", "the header", 1), origin, hint)
                columns = _distinct(fields, origin)
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


def _parquet(path: Path) -> Iterator[Row]:
    """Read a Parquet file batch by batch."""
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        # Without a buffer, columns of a row group are in memory as a whole.
        with pyarrow.parquet.ParquetFile(path, buffer_size=streams.BLOCK_BYTES) as file:
            _distinct(file.schema_arrow.names, str(path))
            # Threads take memory of their own for their stacks, by the number of processors.
            yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)

    return rows_of_columns(str(path), "Parquet file", _within_reason(path, batches()))


def _arrow(path: Path) -> Iterator[Row]:
    """Read Arrow's own format, a file (Feather) or a stream, batch by batch."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            options = pyarrow.ipc.IpcReadOptions(use_threads=False)
            opened = (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(file, options=options)
            _distinct(opened.schema.names, str(path))
            whole = opened if is_stream else (opened.get_batch(n) for n in range(opened.num_record_batches))
            for batch in whole:
                # Arrow believes the file's offsets; false ones lead out of its memory.
                batch.validate(full=True)
                yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))

    return rows_of_columns(str(path), "Arrow file", _within_reason(path, batches()))


def _within_reason(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches as long as neither their memory nor their number is out of all proportion to the file."""
    import pyarrow

    # Where Arrow was imported before this program, its first use reserves memory: outside of the bound.
    pyarrow.allocate_buffer(1)
    most, number = FREE_ROWS + MAX_ROWS_PER_BYTE * path.stat().st_size, 0
    while True:
        with bounded_memory(MAX_BATCH_BYTES):
            batch = next(batches, None)
        if batch is None:
            return
        number += batch.num_rows
        if number > most:
            hint = "no file is so repetitive; if this one is, write its rows as JSON lines"
            raise UserError(f"the file holds more than {most:,} rows in {path.stat().st_size:,} bytes", str(path), hint)
        yield batch


def rows_of_columns(place: str, kind: str, batches: Iterable[Any]) -> Iterator[Row]:
    """Yield the rows of record batches, or of tables.

    Args:
        place: What their origins begin with.
        kind: What they are read from: `Parquet file`.
        batches: Some rows each.

    Raises:
        UserError: They cannot be read beyond some row.
    """
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for values, problem in _values(batch):
                number += 1
                origin = f"{place}:row {number}"
                yield Row(origin, None, problem) if problem else as_row(values, origin)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        if isinstance(error, MemoryError):
            what = f"{BATCH_ROWS:,} rows of the {kind} take more than {MAX_BATCH_BYTES >> 20:,} MiB of memory"
            hint = "it is damaged, or its values are too long for it: write it again, or as JSON lines"
            raise UserError(what, f"{place}:row {number + 1}", hint) from None
        reason = printable(str(error).partition("\n")[0] or type(error).__name__, _REASON_LENGTH)
        hint = f"it is damaged or is no {kind}: write it again"
        raise UserError(f"the {kind} cannot be read: {reason}", f"{place}:row {number + 1}", hint) from None


def _values(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Yield the values of each row of a batch, or what is wrong with them."""
    rows, problem = [], too_long() if batch.nbytes > streams.MAX_ROW_BYTES else ""
    try:
        if not problem:
            with bounded_memory(MAX_BATCH_BYTES):
                rows = _as_python(batch)
    except MemoryError:
        problem = too_long()
    except (ValueError, OverflowError, RecursionError) as error:
        problem = f"the row cannot be read: {printable(error, _REASON_LENGTH)}"
    if not problem:
        yield from ((row, "") for row in rows)
    elif batch.num_rows == 1:
        yield None, problem
    else:
        for row in range(batch.num_rows):
            yield from _values(batch.slice(row, 1))


def _as_python(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch as JSON lines would have them."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        if _WITH_OBJECTS.search(str(field.type)):
            for row in rows:
                row[field.name] = _as_json(row[field.name], field.type)
    return rows


def _as_json(value: Any, kind: Any) -> Any:
    """Decode the JSON in a value of some Arrow type; leave out the nulls of objects.

    All objects of a column have the same members: those that one of them does not have are null.
    """
    from pyarrow import types

    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    kind = getattr(kind, "storage_type", kind)
    if isinstance(value, dict) and types.is_struct(kind):
        there = ((name, inner) for name, inner in value.items() if inner is not None)
        return {name: _as_json(inner, kind.field(name).type) for name, inner in there}
    if isinstance(value, list) and not types.is_map(kind):
        return [_as_json(inner, kind.value_type) for inner in value]
    return value


def _distinct(columns: Sequence[str], where: str) -> list[str]:
    """Return the names of columns, of which no two may be the same; those without a name cannot be confused."""
    for name in columns:
        if name and columns.count(name) > 1:
            raise UserError(f"two columns are called `{printable(name)}`", where, "give each column a name of its own")
    return list(columns)


_LINES = functools.partial(_read, named=_json_lines)
_IPC = functools.partial(_read, named=_arrow)

_TEXTS: dict[str, Reader] = {
    ".json": functools.partial(_read, named=_json),
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".csv": functools.partial(_read, named=functools.partial(_separated, delimiter=",")),
    ".tsv": functools.partial(_read, named=functools.partial(_separated, delimiter="\t")),
}

_COLUMNS: dict[str, Reader] = {
    ".parquet": functools.partial(_read, named=_parquet),
    ".arrow": _IPC,
    ".feather": _IPC,
}

_SAYING_NOTHING = ("", ".txt", *COMPRESSIONS)
"""Endings that do not say what a file holds."""

_COMPRESSED = {f"{ending}{packed}": reader for ending, reader in _TEXTS.items() for packed in COMPRESSIONS}

READERS = {**_TEXTS, **_COMPRESSED, **_COLUMNS}

ENDINGS = f"{', '.join([*_TEXTS, *_COLUMNS])}; those of text also with {', '.join(COMPRESSIONS)} behind it"
"""The endings of all kinds in a few words."""
