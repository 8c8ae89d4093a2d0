"""A file is read as what its first bytes are, whatever its name says; what is no data file is called by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from dpo_cli.data.pairs.sources import Source, check_source, read_rows
from dpo_cli.errors import UserError
from tests.data.data_files import COLUMNS, PACKERS, ROWS, TEXTS, as_json, as_lines, as_table, rows_until_error, write

ENDINGS = [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".feather"]


def values(path):
    return [row.values for row in read_rows(Source(path=str(path)))]


def bytes_as(tmp_path, kind):
    """Return what a file of some kind holds."""
    return write(tmp_path / f"as-it-is-called{kind}", ROWS).read_bytes()


@pytest.mark.parametrize("name", [*(f"pairs{ending}" for ending in ENDINGS), "pairs", "pairs.txt", "0f3a9c"])
@pytest.mark.parametrize("kind", [*COLUMNS, ".json", ".jsonl"])
def test_columns_and_json_are_read_under_every_name(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(bytes_as(tmp_path, kind))
    assert values(path) == ROWS


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz", "pairs.json.zst", "pairs", "pairs.gz"])
def test_what_is_compressed_is_seen_by_its_first_bytes(tmp_path, packed, name):
    path = tmp_path / name
    path.write_bytes(PACKERS[packed](as_lines(ROWS).encode()))
    assert values(path) == ROWS


def test_a_table_that_is_compressed_keeps_its_separator(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(bz2.compress(as_table(ROWS, "\t").encode()))
    assert values(path) == ROWS


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_table_s_separator_is_that_of_its_header(tmp_path, separator, name, mark):
    path = tmp_path / name
    path.write_bytes(mark + as_table(ROWS, separator).encode())
    assert values(path) == ROWS


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("a;b,c", ["a;b", "c"]),  # The separator of the ending goes first.
        ('"a;b"', ["a;b"]),
        ("text", ["text"]),
        ("a;", ["a;"]),
        ("a\tb;c\td", ["a", "b;c", "d"]),
    ],
)
def test_a_separator_is_not_seen_where_there_is_none(tmp_path, header, columns):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{header}\n{header}\n", encoding="utf-8")
    assert [list(row) for row in values(path)] == [columns]


def test_lists_on_single_lines_are_no_json_list(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('[{"a": 1}]\n{"a": 2}\n', encoding="utf-8")
    rows, error = rows_until_error(path)
    assert error is None
    assert [row.problem for row in rows] == ["the row is not a JSON object", ""]


def a_zip(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, as_lines(ROWS))
    return file.getvalue()


def a_tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pairs.jsonl"), io.BytesIO())
    return file.getvalue()


def an_array():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
NO_DATA = {
    "a zip archive": (a_zip("pairs.jsonl"), "unpack it"),
    "a spreadsheet": (a_zip("xl/workbook.xml"), "CSV"),
    "a tar archive": (a_tar(), "unpack it"),
    "compressed with xz": (lzma.compress(b"{}"), "unpack it"),
    "a Python pickle": (pickle.dumps(ROWS), "JSON lines"),
    "binary data": (an_array(), "JSON lines"),
    "a Git LFS pointer": (POINTER, "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html>\n<html><head>", "/resolve/"),
    "XML": (b"<?xml version='1.0'?>", "JSON lines"),
    "UTF-16": (as_lines(ROWS).encode("utf-16-le"), "UTF-8"),
    "UTF-16 by": (as_json(ROWS).encode("utf-16-be"), "UTF-8"),
    "UTF-32": (as_lines(ROWS).encode("utf-32-le"), "UTF-8"),
    "UTF-32 by": (as_table(ROWS).encode("utf-32-be"), "UTF-8"),
}


@pytest.mark.parametrize("what", NO_DATA)
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.csv", "pairs.parquet", "pairs"])
def test_what_is_no_data_file_is_called_by_its_name(tmp_path, what, name):
    content, hint = NO_DATA[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"the file is {what}") as caught:
        values(tmp_path / name)
    assert hint in (caught.value.hint or "")


def test_a_compressed_file_of_columns_is_to_be_unpacked(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(gzip.compress(bytes_as(tmp_path, ".parquet")))
    with pytest.raises(UserError, match="compressed as a whole") as caught:
        values(path)
    assert caught.value.hint == "unpack it"


@pytest.mark.parametrize("content", [b"", b"once upon a time\n", b"a,b\n1,2\n"])
def test_a_file_without_a_telling_name_or_content_is_refused(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    problem = check_source(Source(path=str(tmp_path / "notes")))
    assert problem is not None and "is not a data file of a known type" in problem.what


@pytest.mark.parametrize("ending", TEXTS)
def test_a_text_that_only_begins_like_something_else_is_read(tmp_path, ending):
    rows = [{"PAR": "BZ", "PK": json.dumps({"a": [1]})}, {"PAR": "<html>", "PK": "version https://git-lfs"}]
    path = tmp_path / f"pairs{ending}"
    path.write_text(TEXTS[ending](rows), encoding="utf-8")
    assert values(path) == rows
