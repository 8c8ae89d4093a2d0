"""A data file becomes rows, each with the line or the number it came from.

A row that cannot be read does not end the reading: it travels on as a row with a problem, so that all problems of a
file are found in one pass. What makes the rest of a file unreadable is a `UserError`. No file is ever whole in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_cli.data.records import Row
from dpo_cli.data.rows import file_types
from dpo_cli.data.rows.streams import COMPRESSIONS, head_of, is_packed
from dpo_cli.data.rows.text_files import json_lines, json_list, separated
from dpo_cli.errors import UserError

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
    if reader is json_list and not _is_rather_json(head, named):
        reader = named
    yield from (reader or named)(path)


def _is_rather_json(head: bytes, named: Reader) -> bool:
    """Tell whether what begins like JSON is to be read as that, and not as what the file's ending says."""
    if named is json_lines:
        return file_types.is_json_list(head)
    return named is json_list or file_types.is_json_object_first(head)


def _by_content(path: Path, head: bytes) -> Reader | None:
    """Return what reads a file that begins so; None where its first bytes do not tell.

    Raises:
        UserError: They are those of something that is no data file.
    """
    if file_types.is_parquet(head) or file_types.is_arrow(head):
        if is_packed(path):
            raise UserError("a Parquet or Arrow file cannot be compressed as a whole", str(path), "unpack it")
        return _parquet if file_types.is_parquet(head) else _arrow
    file_types.check_content(head, path)
    return json_list if file_types.starts_as_json(head) else None


def _parquet(path: Path) -> Iterator[Row]:
    # Which files are read is checked long before one is: Arrow is imported then.
    from dpo_cli.data.rows import column_files

    return column_files.parquet(path)


def _arrow(path: Path) -> Iterator[Row]:
    from dpo_cli.data.rows import column_files

    return column_files.arrow(path)


_LINES = functools.partial(_read, named=json_lines)
_IPC = functools.partial(_read, named=_arrow)

_TEXTS: dict[str, Reader] = {
    ".json": functools.partial(_read, named=json_list),
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".csv": functools.partial(_read, named=functools.partial(separated, delimiter=",")),
    ".tsv": functools.partial(_read, named=functools.partial(separated, delimiter="\t")),
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

ENDINGS = f"{', '.join([*_TEXTS, *_COLUMNS])}; text formats also with {', '.join(COMPRESSIONS)} behind it"
"""The endings of all kinds in a few words."""
