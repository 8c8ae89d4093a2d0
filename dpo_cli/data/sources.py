"""Files, folders and Hub ids become rows, each with the place it came from.

A row that cannot be read does not end the reading: it travels on as a row with a problem, so that all
problems of a source are found in one pass. What makes the rest of a file unreadable is a `UserError`.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.data.records import NUMBERS
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.storage import file_digest, text_digest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source: its values, or the problem that kept it from being read."""

    origin: str
    values: Mapping[str, object] | None
    problem: str = ""


def check_source(source: str, where: str | None = None) -> UserError | None:
    """Say what is wrong with a source's name, without reading it."""
    if not source.strip():
        return UserError("the name of a source is empty", where, "name a data file, a folder or a Hub id")
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() in READERS:
            return None
        known = ", ".join(READERS)
        hint = f"a data file ends in one of {known}"
        return UserError(f"`{source}` is not a kind of data file that can be read", where, hint)
    # What ends like a data file is a path that was mistyped, though a Hub id may look the same.
    if path.is_dir() or (_HUB_ID.fullmatch(source) and path.suffix.lower() not in READERS):
        return None
    folder = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    hint = f"did you mean `{folder / near[0]}`?" if near else "name a data file, a folder or a Hub id"
    return UserError(f"there is no file or folder `{source}`", where, hint)


def read_rows(source: str) -> Iterator[Row]:
    """Yield the rows of a data file, of a folder of data files, or of the training split of a Hub dataset.

    Raises:
        UserError: The source does not exist, or cannot be read beyond some point.
    """
    if problem := check_source(source):
        raise problem
    path = Path(source)
    try:
        yield from READERS[path.suffix.lower()](path) if path.is_file() else _dataset_rows(source)
    except OSError as error:
        raise from_os_error(error, "reading the data", source, status=2) from error


def source_digest(source: str) -> str:
    """Return a digest that changes whenever the content of a source does."""
    if problem := check_source(source):
        raise problem
    path = Path(source)
    try:
        if path.is_file():
            return file_digest(path)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.is_file()]
            return text_digest(*(f"{p.relative_to(path)} {file_digest(p)}" for p in files))
    except OSError as error:
        raise from_os_error(error, "reading the data", source, status=2) from error
    return str(_load_dataset(source)._fingerprint)


def _json_lines(path: Path) -> Iterator[Row]:
    """Read one JSON object per line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if text:
                yield _decoded(text, f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    """Read a JSON list of objects, or one object per line where the file starts with an object."""
    text = _whole_text(path)
    start = _skip_space(text, 0)
    if start < len(text) and text[start] == "{" and not _is_one_object(text):
        yield from _json_lines(path)
        return
    if start == len(text) or text[start] != "[":
        raise UserError("the file is not a JSON list", f"{path}:1", "a .json file holds a list of objects")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, start + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken_json(error, path, line) from None
        yield _as_row(value, origin)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise _broken_json(ValueError("expected a comma or the list's end"), path, line)
    position = _skip_space(text, position + 1)
    if position < len(text):
        line += text.count("\n", counted, position)
        raise _broken_json(ValueError("something follows the list's end"), path, line)


def _is_one_object(text: str) -> bool:
    """Tell whether a file is a single object over several lines, rather than an object a line."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text.strip()


def _csv(path: Path) -> Iterator[Row]:
    """Read comma-separated values whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_whole_text(path), newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(origin, None, f"is not valid CSV: {error}")
            continue
        if not fields:
            continue
        if columns is None:
            columns = fields
        elif len(fields) != len(columns):
            yield Row(origin, None, f"has {len(fields)} fields where the header has {len(columns)}")
        else:
            yield Row(origin, _with_numbers(dict(zip(columns, fields, strict=True))))


def _with_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Read the columns that hold numbers, which CSV has as text; what is no number stays text."""
    for name in NUMBERS:
        if (text := values.get(name)) is not None:
            with contextlib.suppress(ValueError):
                values[name] = float(text) if text.strip() else None
    return values


def _parquet(path: Path) -> Iterator[Row]:
    """Read a Parquet file batch by batch."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "the file is damaged or is not Parquet: write it again"
        raise UserError(f"the Parquet file cannot be read: {reason}", f"{path}:row {number + 1}", hint) from None


def _dataset_rows(source: str) -> Iterator[Row]:
    """Read a folder of data files, or a Hub dataset, through the `datasets` library."""
    for number, values in enumerate(_load_dataset(source), 1):
        yield Row(f"{source}:row {number}", values)


def _load_dataset(source: str) -> Any:
    """Load the training split, rendering what the library says when it cannot."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "check the name; a Hub dataset needs the network, a folder needs data files of one kind"
        raise UserError(f"`{source}` cannot be loaded: {reason}", source, hint) from error


def _whole_text(path: Path) -> str:
    """Read a file as UTF-8, with or without a byte-order mark; name the line of a byte that is not."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise UserError(f"byte {data[error.start]:#04x} is not UTF-8", f"{path}:{line}", hint) from None


def _decoded(line: bytes, origin: str) -> Row:
    """Decode one line of JSON."""
    try:
        return _as_row(json.loads(line.decode("utf-8")), origin)
    except UnicodeDecodeError as error:
        return Row(origin, None, f"is not UTF-8: byte {line[error.start]:#04x}")
    except json.JSONDecodeError as error:
        return Row(origin, None, f"is not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Row(origin, None, f"is not valid JSON: {_short(error)}")


def _as_row(value: object, origin: str) -> Row:
    """Accept an object, refuse any other JSON value."""
    return Row(origin, value) if isinstance(value, dict) else Row(origin, None, "is not a JSON object")


def _broken_json(error: Exception, path: Path, line: int) -> UserError:
    """Say on which line a JSON list breaks; what follows cannot be read."""
    if isinstance(error, json.JSONDecodeError):
        line = error.lineno
    reason = error.msg if isinstance(error, json.JSONDecodeError) else _short(error)
    hint = "mend that line; the rest of a JSON list cannot be read past it (JSON lines can)"
    return UserError(f"the file is not valid JSON: {reason}", f"{path}:{line}", hint)


def _short(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    """Return the first position at or after `position` that is not white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
