"""Rows of files of columns, Parquet and Arrow, a batch at a time and within bounds: their sizes may be false."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from dpo_cli.data.records import Row
from dpo_cli.data.rows import streams
from dpo_cli.data.rows.fields import distinct, printable
from dpo_cli.data.rows.json_lists import as_row
from dpo_cli.data.rows.streams import too_long
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
"""How much is shown of what Arrow says of a file; it may quote the file."""


def parquet(path: Path) -> Iterator[Row]:
    """Read a Parquet file batch by batch."""

    def batches() -> Iterator[Any]:
        # Without a buffer, columns of a row group are in memory as a whole.
        with pq.ParquetFile(path, buffer_size=streams.BLOCK_BYTES) as file:
            distinct(file.schema_arrow.names, str(path))
            # Threads take memory of their own for their stacks, by the number of processors.
            yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)

    return rows_of_columns(str(path), "Parquet file", _within_reason(path, batches()))


def arrow(path: Path) -> Iterator[Row]:
    """Read Arrow's own format, a file (Feather) or a stream, batch by batch."""

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(6) != b"ARROW1"
            file.seek(0)
            options = pa.ipc.IpcReadOptions(use_threads=False)
            opened = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file, options=options)
            distinct(opened.schema.names, str(path))
            whole = opened if is_stream else (opened.get_batch(n) for n in range(opened.num_record_batches))
            for batch in whole:
                # Arrow believes the file's offsets; false ones lead out of its memory.
                batch.validate(full=True)
                yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))

    return rows_of_columns(str(path), "Arrow file", _within_reason(path, batches()))


def _within_reason(path: Path, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches as long as neither their memory nor their number is out of all proportion to the file."""
    # Where Arrow was imported before this program, its first use reserves memory: outside of the bound.
    pa.allocate_buffer(1)
    most, number = FREE_ROWS + MAX_ROWS_PER_BYTE * path.stat().st_size, 0
    while True:
        with bounded_memory(MAX_BATCH_BYTES):
            batch = next(batches, None)
        if batch is None:
            return
        number += batch.num_rows
        if number > most:
            hint = "if its rows really are so repetitive, write them as JSON lines"
            raise UserError(f"the file has more than {most:,} rows in {path.stat().st_size:,} bytes", str(path), hint)
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
    number = 0
    try:
        for batch in batches:
            for values, problem in _values(batch):
                number += 1
                origin = f"{place}:row {number}"
                yield Row(origin, None, problem) if problem else as_row(values, origin)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        if isinstance(error, MemoryError):
            what = f"{BATCH_ROWS:,} rows of the {kind} take more than {MAX_BATCH_BYTES >> 20:,} MiB of memory"
            hint = "it is damaged, or its values are too long for it: write it again, or as JSON lines"
            raise UserError(what, f"{place}:row {number + 1}", hint) from None
        reason = printable(str(error).partition("\n")[0] or type(error).__name__, _REASON_LENGTH)
        hint = f"it is damaged or not a {kind}: write it again"
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
