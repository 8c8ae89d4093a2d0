"""Files become rows with the place they came from; what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.sources import READERS, check_source, read_rows, source_digest
from dpo_cli.errors import UserError

ROWS = [
    {"instruction": "Say hi.", "chosen": "Hi.", "rejected": "Well, hi, then."},
    {"instruction": 'Quote "this", please.\nOn two lines.', "chosen": "“this”", "rejected": "no"},
    {"instruction": "你好？", "chosen": "你好！", "rejected": "…"},
]


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {".json": write_json, ".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def test_every_reader_is_tested():
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize(
    ("suffix", "places"),
    [(".json", ["2", "7", "12"]), (".jsonl", ["1", "2", "3"]), (".csv", ["2", "3", "5"]),
     (".parquet", ["row 1", "row 2", "row 3"])],
)  # fmt: skip
def test_rows_arrive_whole_and_know_their_place(tmp_path, suffix, places):
    path = tmp_path / f"pairs{suffix}"
    WRITERS[suffix](path)
    rows = list(read_rows(str(path)))
    assert [row.values for row in rows] == ROWS
    assert [row.origin for row in rows] == [f"{path}:{place}" for place in places]


def test_a_folder_of_data_files_is_read(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    rows = list(read_rows(str(tmp_path)))
    assert [row.values for row in rows] == ROWS
    assert rows[1].origin == f"{tmp_path}:row 2"


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "pairs.json"
    write_jsonl(path)
    assert [row.values for row in read_rows(str(path))] == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    WRITERS[suffix](path)
    text = path.read_bytes().replace(b"\r\n", b"\n")
    rows_before = [row.values for row in read_rows(str(path))]
    if suffix != ".csv":  # in CSV a line end within quotes is data
        text = text.replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert [row.values for row in read_rows(str(path))] == rows_before


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"instruction": "cut o', "is not valid JSON: Unterminated string"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 0xff"),
        (b"[1, 2]", "is not a JSON object"),
        (b"42", "is not a JSON object"),
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_a_broken_line_is_found_and_the_others_are_read(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n\n" + good + b"\n")
    rows = list(read_rows(str(path)))
    assert [row.values is not None for row in rows] == [True, False, True]
    assert rows[1].origin == f"{path}:2"
    assert rows[1].problem.startswith(problem)
    assert rows[2].origin == f"{path}:4"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", b'[\n{"a": 1},\n{"b": }\n]', 3),
        ("a.json", b'[\n{"a": 1}\n{"b": 2}\n]', 3),
        ("a.json", b'[\n{"a": 1}', 2),
        ("a.json", b'[{"a": 1}]\ntrailing', 2),
        ("a.json", b'"text"', 1),
        ("a.json", b"", 1),
        ("a.json", b'[\n{"a": "\xff"}]', 2),
        ("a.csv", b"a,b\n1,\xff\n", 2),
    ],
)
def test_what_makes_the_rest_of_a_file_unreadable_is_one_error_with_its_line(tmp_path, name, content, line):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    assert caught.value.where == f"{path}:{line}"
    assert caught.value.hint


def test_numbers_in_csv_are_numbers_where_a_column_holds_them(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("instruction,weight,margin\n7,2,-0.5\n7,, \n7,two,nan\n", encoding="utf-8")
    first, second, third = (row.values for row in read_rows(str(path)))
    assert first == {"instruction": "7", "weight": 2.0, "margin": -0.5}
    assert second == {"instruction": "7", "weight": None, "margin": None}
    assert third["weight"] == "two"
    assert math.isnan(third["margin"])


def test_a_csv_row_of_another_width_is_found_and_the_others_are_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('a,b\n1,2\n3\n4,"5\n6"\n7,8,9\n', encoding="utf-8")
    rows = list(read_rows(str(path)))
    assert [row.values for row in rows] == [{"a": "1", "b": "2"}, None, {"a": "4", "b": "5\n6"}, None]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "3", "4", "6"]
    assert "1 fields where the header has 2" in rows[1].problem


def test_a_damaged_parquet_file_is_one_error(tmp_path):
    path = tmp_path / "pairs.parquet"
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(str(path)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pairs.jsnl", r"did you mean `.*pairs\.jsonl`\?"), ("pairs.txt", "ends in one of")],
)
def test_a_source_that_is_not_there_or_no_data_is_explained(tmp_path, name, hint):
    write_jsonl(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.txt").write_text("x")
    problem = check_source(str(tmp_path / name), "`data.train`")
    assert problem is not None
    assert re.search(hint, problem.hint)
    assert problem.where == "`data.train`"


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_digest_changes_with_a_byte_and_not_with_the_name(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    WRITERS[suffix](first)
    second.write_bytes(first.read_bytes())
    assert source_digest(str(first)) == source_digest(str(second))
    second.write_bytes(first.read_bytes() + b"\n")
    assert source_digest(str(first)) != source_digest(str(second))


@given(st.binary(max_size=200), st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_any_bytes_give_rows_or_a_user_error(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"pairs{suffix}"
    path.write_bytes(content)
    try:
        rows = list(read_rows(str(path)))
    except UserError as error:
        assert error.where
    else:
        assert all((row.values is None) == bool(row.problem) for row in rows)
