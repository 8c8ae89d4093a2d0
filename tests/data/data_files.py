"""The same rows in every kind of data file."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from dpo_cli.data.records import Row
from dpo_cli.data.rows.files import reader_of
from dpo_cli.errors import UserError

ROWS = [
    {"instruction": "Say hi.", "chosen": "Hi.", "rejected": "Well, hi, then."},
    {"instruction": 'Quote "this", please.\nOn two lines.', "chosen": "“this”", "rejected": "no"},
    {"instruction": "你好？", "chosen": "你好！\t🙂", "rejected": "…"},
]


def read(path: Path) -> Iterator[Row]:
    reader = reader_of(path)
    assert reader is not None
    return reader(path)


def rows_until_error(path: Path) -> tuple[list[Row], UserError | None]:
    rows: list[Row] = []
    try:
        rows.extend(read(path))
    except UserError as error:
        return rows, error
    return rows, None


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False)


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    def field(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    return "".join(delimiter.join(map(field, line)) + "\r\n" for line in lines)


def write_stream(rows, path):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TEXTS = {
    ".json": as_json,
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".csv": as_table,
    ".tsv": lambda rows: as_table(rows, "\t"),
}
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
COLUMNS = {
    ".parquet": lambda rows, path: pq.write_table(pa.Table.from_pylist(rows), path),
    ".arrow": write_stream,
    ".feather": lambda rows, path: pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path)),
}
KINDS = [*(f"{ending}{packed}" for ending in TEXTS for packed in PACKERS), *COLUMNS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = next(kind for kind in sorted(KINDS, key=len, reverse=True) if path.name.endswith(kind))
    if kind in COLUMNS:
        COLUMNS[kind](rows, path)
    else:
        ending, packed = next((e, kind.removeprefix(e)) for e in TEXTS if kind.removeprefix(e) in PACKERS)
        path.write_bytes(PACKERS[packed](TEXTS[ending](rows).encode()))
    return path
