"""Data files become rows with the line they came from; what cannot be read is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pickle
import random
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.data.records import Row
from dpo_cli.data.rows import streams
from dpo_cli.data.rows.files import READERS, reader_of
from dpo_cli.errors import UserError
from tests.data.data_files import (
    COLUMNS,
    KINDS,
    PACKERS,
    ROWS,
    TEXTS,
    as_lines,
    read,
    rows_until_error,
    write,
)

LINES = {".json": ["2", "7", "12"], ".jsonl": ["1", "2", "3"], ".csv": ["2", "3", "5"]}
LINES |= {".ndjson": LINES[".jsonl"], ".tsv": LINES[".csv"]}


def test_every_reader_is_tested():
    assert set(KINDS) == set(READERS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_read_the_same_from_every_kind_of_file(tmp_path, kind):
    path = write(tmp_path / f"some.pairs{kind}", ROWS)
    rows = list(read(path))
    assert [row.values for row in rows] == ROWS
    places = next((LINES[ending] for ending in LINES if kind.startswith(f"{ending}.") or kind == ending), None)
    assert [row.origin for row in rows] == [f"{path}:{place}" for place in places or ["row 1", "row 2", "row 3"]]


def test_endings_are_known_in_capitals_and_the_last_one_counts():
    assert reader_of(Path("A.JSONL.GZ")) is reader_of(Path("a.csv.jsonl")) is READERS[".jsonl"]
    assert [reader_of(Path(name)) for name in ("jsonl", ".jsonl", "a.gz", "a.txt", "a.parquet.gz", "a.")] == [None] * 6


def test_rows_of_a_list_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(ROWS)[:-1] + ',\n{"a": 1}, 5]', encoding="utf-8")
    places = [row.origin.removeprefix(f"{path}:") for row in read(path)]
    assert places == ["1", "1, row 2", "1, row 3", "2", "2, row 5"]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_an_arrow_file_is_read_as_a_file_as_well_as_a_stream(tmp_path, rows):
    table = pa.Table.from_pylist(ROWS * 3)
    with pa.ipc.new_file(tmp_path / "pairs.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    assert [row.values for row in read(tmp_path / "pairs.arrow")] == ROWS * 3


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text("\n" + as_lines(ROWS[:1]) + "{oh}\n" + as_lines(ROWS[1:]), encoding="utf-8")
    assert [row.values for row in read(path)] == [ROWS[0], None, *ROWS[1:]]
    path.write_text('{"cut o\n' + as_lines(ROWS), encoding="utf-8")
    assert [row.origin for row in read(path) if row.problem] == [f"{path}:1"]


# Wherever a file is cut into blocks


texts = st.text(st.sampled_from('a"\\,\t\r\n {}[]é你🙂\u2028\x85'), max_size=8)
tables = st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1, max_size=5)
blanks = st.text(" \t\r\n", max_size=4)


def in_blocks(monkeypatch: pytest.MonkeyPatch, size: int, path: Path) -> list[Row]:
    with monkeypatch.context() as patch:
        patch.setattr(streams, "BLOCK_BYTES", size)
        return list(read(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=tables, gaps=st.lists(blanks, min_size=25, max_size=25), size=st.integers(1, 40), raw=st.booleans())
def test_a_list_reads_the_same_wherever_blocks_end(tmp_path, monkeypatch, rows, gaps, size, raw):
    gap, text, lines, places = iter(gaps), "", [], []
    for number, row in enumerate(rows, 1):
        text += next(gap) + ("," if lines else "[") + next(gap)
        lines.append(text.count("\n") + 1)
        places.append(f"{lines[-1]}, row {number}" if lines[-1] in lines[:-1] else f"{lines[-1]}")
        text += json.dumps(row, ensure_ascii=raw, indent=size % 3 or None)
    path = tmp_path / "pairs.json"
    path.write_bytes((text + next(gap) + "]" + next(gap)).encode())
    found = in_blocks(monkeypatch, size, path)
    assert [row.values for row in found] == rows
    assert [row.origin for row in found] == [f"{path}:{place}" for place in places]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=tables,
    size=st.integers(1, 40),
    kind=st.sampled_from([".jsonl", ".csv", ".tsv"]),
    packed=st.sampled_from(sorted(PACKERS)),
    marked=st.booleans(),
)
def test_lines_read_the_same_wherever_blocks_end(tmp_path, monkeypatch, rows, size, kind, packed, marked):
    path = tmp_path / f"pairs{kind}{packed}"
    path.write_bytes(PACKERS[packed]((b"\xef\xbb\xbf" if marked else b"") + TEXTS[kind](rows).encode()))
    found = in_blocks(monkeypatch, size, path)
    assert [row.values for row in found] == rows
    texts_before = [TEXTS[kind](rows[:count]) if count or kind == ".jsonl" else "a,b\n" for count in range(len(rows))]
    assert [row.origin for row in found] == [f"{path}:{text.count(chr(10)) + 1}" for text in texts_before]


@pytest.mark.parametrize("kind", [".json", ".csv", ".jsonl.gz", ".csv.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    rows = [{"instruction": f"{number} " + "never twice the same ä " * 400, "chosen": "b"} for number in range(200)]
    path = tmp_path / f"pairs{kind}"
    write(path, rows * 16)
    assert sum(len(row["instruction"]) for row in rows) * 16 > 29e6
    list(read(write(tmp_path / f"small{kind}", rows[:2])))
    tracemalloc.start()
    try:
        num_rows = sum(row.values is not None for row in read(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows == 3200
    assert peak < 16e6


# What is no part of the data


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".jsonl.gz"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path, kind):
    ending, packed = next((e, kind.removeprefix(e)) for e in TEXTS if kind.removeprefix(e) in PACKERS)
    text = TEXTS[ending](ROWS).encode()
    if ending != ".csv":  # In CSV a line end within quotes is data, and the others are those of Windows already.
        text = text.replace(b"\n", b"\r\n")
    path = tmp_path / f"pairs{kind}"
    path.write_bytes(PACKERS[packed](b"\xef\xbb\xbf" + text))
    assert [row.values for row in read(path)] == ROWS


def test_numbers_in_csv_are_numbers_where_a_column_holds_them(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("instruction,weight,margin\n7,2,-0.5\n7,, \n7,two,nan\n7,1_000,1\n", encoding="utf-8")
    first, second, third, fourth = (row.values for row in read(path))
    assert first == {"instruction": "7", "weight": 2.0, "margin": -0.5}
    assert second == {"instruction": "7", "weight": None, "margin": None}
    assert third["weight"] == "two"
    assert math.isnan(third["margin"])
    assert fourth == {"instruction": "7", "weight": "1_000", "margin": 1.0}


def test_columns_that_arrow_holds_as_json_are_decoded(tmp_path):
    values = [{"name": "add", "n": 1}, None, [1, "two"]]
    json_texts = [None if value is None else json.dumps(value) for value in values]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(json_texts, pa.string()))
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3], pa.int32()), column)
    table = pa.table({"tools": column, "turns": lists})
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pa.ipc.new_stream(tmp_path / "pairs.arrow", table.schema) as writer:
        writer.write_table(table)
    for kind in (".parquet", ".arrow"):
        rows = [row.values for row in read(tmp_path / f"pairs{kind}")]
        assert [row["tools"] for row in rows] == values
        assert [row["turns"] for row in rows] == [values[:2], [], values[2:]]


def with_objects() -> list[dict[str, Any]]:
    """Write rows whose objects have different members, as tools, calls and arguments of a template have."""
    tools = [
        {"name": "add", "parameters": {"properties": {"expr": {"type": "string"}}, "required": ["expr"]}},
        {"name": "weather", "parameters": {"properties": {"city": {"type": "string", "enum": ["Ulm"]}}}},
        {"name": "now", "parameters": {"properties": {}}},
    ]
    calls = [{"name": "add", "arguments": {"expr": "1+2"}}, {"name": "weather", "arguments": {"city": "Ulm"}}]
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]} for call in calls]
    kwargs = [{"enable_thinking": True}, {"date": {"day": 1}}, {}]
    return [
        {"prompt": [{"role": "user", "content": "Hi."}, *turns[:n]], "tools": tools[n:], "chat_template_kwargs": given}
        for n, given in enumerate(kwargs)
    ]


@pytest.mark.parametrize("kind", COLUMNS)
def test_objects_with_different_members_are_the_same_in_columns_as_in_lines(tmp_path, kind):
    rows = with_objects()
    lines, columns = (write(tmp_path / f"pairs{ending}", rows) for ending in (".jsonl", kind))
    assert [row.values for row in read(columns)] == [row.values for row in read(lines)] == rows


def test_nulls_are_left_out_of_objects_and_of_nothing_else(tmp_path):
    rows = [{"a": None, "b": [1, None], "c": {"x": [None, {"y": None}], "z": None}}, {"a": 1, "b": None, "c": None}]
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = (row.values for row in read(path))
    assert first == {"a": None, "b": [1, None], "c": {"x": [None, {}]}}
    assert second == rows[1]


def test_a_null_that_a_column_of_json_says_is_kept(tmp_path):
    value = {"default": None, "enum": [None]}
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(value)]))
    pq.write_table(pa.table({"tools": column}), tmp_path / "pairs.parquet")
    assert [row.values for row in read(tmp_path / "pairs.parquet")] == [{"tools": value}]


# One row is broken, the others are read


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"instruction": "cut o', "the row is not valid JSON: Unterminated string"),
        (b'{"a": "\xff"}', "the row is not UTF-8: byte 0xff"),
        (b"[1, 2]", "the row is not a JSON object"),
        (b"42", "the row is not a JSON object"),
        (b"[" * 100_000, "the row is not valid JSON: it is nested too deeply"),
        (b'{"a": ' * 100_000, "the row is not valid JSON: it is nested too deeply"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "the row is nested more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the row is not valid JSON: Exceeds the limit"),
        (b'{"a": 1, "b": 2, "a": 3}', "the row has the key `a` twice"),
        (b'{"a": [{"role": 1, "role": 1}]}', "the row has the key `role` twice"),
    ],
)
def test_a_broken_line_is_found_and_the_others_are_read(tmp_path, line, problem):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n\n" + good + b"\n")
    rows = list(read(path))
    assert [row.values is not None for row in rows] == [True, False, True]
    assert rows[1].origin == f"{path}:2"
    assert rows[1].problem.startswith(problem)
    assert rows[2].origin == f"{path}:4"


@pytest.mark.parametrize("num_levels", [64, 65, 300, 900])
def test_a_row_that_is_read_can_be_sent_to_another_process(tmp_path, num_levels):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"a":' * (num_levels - 1) + "[]" + "}" * (num_levels - 1), encoding="utf-8")
    (row,) = read(path)
    assert pickle.loads(pickle.dumps(row)) == row
    assert (row.values is not None) == (num_levels <= 64)


@pytest.mark.parametrize("member", [b'{"a": "\xff"}', b'{"a": "\xe4\xbd"}', b"42", b'"text"', b"[1]", b"null", b"1e3"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_broken_member_of_a_list_is_found_and_the_others_are_read(tmp_path, monkeypatch, member, size):
    path = tmp_path / "pairs.json"
    path.write_bytes('[{"a": "你"},\n'.encode() + member + b'\n,\n{"a": 1}]')
    rows = in_blocks(monkeypatch, size, path)
    assert [row.values for row in rows] == [{"a": "你"}, None, {"a": 1}]
    assert rows[1].origin == f"{path}:2"
    assert re.match(
        "the row is not UTF-8: byte 0x(ff|e4)" if member.startswith(b"{") else "the row is not a JSON obj",
        rows[1].problem,
    )
    assert rows[2].origin == f"{path}:4"


def test_a_member_that_says_a_thing_twice_is_found_and_the_others_are_read(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('[{"a": 1},\n{"a": {"b": 1, "b": 2}},\n{"a": 1}]')
    rows = list(read(path))
    assert [row.values for row in rows] == [{"a": 1}, None, {"a": 1}]
    assert rows[1].problem == "the row has the key `b` twice in one object"


def test_a_csv_row_of_another_width_is_found_and_the_others_are_read(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('a,b\n1,2\n3\n4,"5\n6"\n7,8,9\n', encoding="utf-8")
    rows = list(read(path))
    assert [row.values for row in rows] == [{"a": "1", "b": "2"}, None, {"a": "4", "b": "5\n6"}, None]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "3", "4", "6"]
    assert "1 fields where the header has 2" in rows[1].problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'1,"open', "the row is not valid CSV"),
        (b'1,"He said "hi" to me"', "the row is not valid CSV"),
        (b"1,\xff", "the row is not UTF-8: byte 0xff"),
        (b"1,a\rb", "the row is not valid CSV: new-line character"),
    ],
)
@pytest.mark.parametrize("after", [b"2,b\n3,c\n", b'2,"b"\n3,c\n', b'2,"b\nb"\n3,c\n'])
def test_a_csv_row_with_broken_quotes_or_bytes_takes_no_other_with_it(tmp_path, line, problem, after):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"a,b\n0,x\n" + line + b"\n" + after)
    rows = list(read(path))
    assert [row.values and row.values["a"] for row in rows] == ["0", None, "2", "3"]
    assert rows[1].problem.startswith(problem)
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "3", "4", str(3 + after.count(b"\n"))]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (".jsonl", '{{"a": 0}}\n{{"a": "{}"}}\n{{"a": 2}}\n'),
        (".csv", 'a,b\n0,x\n1,{}\n2,x\n'),
        (".csv", 'a,b\n0,x\n1,"\n{}",1\n2,x\n'),
    ],
)  # fmt: skip
def test_a_row_of_immense_length_is_a_problem_and_not_in_memory(tmp_path, monkeypatch, kind, text):
    path = tmp_path / f"pairs{kind}"
    path.write_text(text.format("a" * 3000), encoding="utf-8")
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1000)
    rows = list(read(path))
    values = [row.values for row in rows]
    assert [str(row["a"]) for row in values if row is not None] == ["0", "2"]
    assert any("is longer than 1,000 bytes" in row.problem for row in rows)


# The rest of a file cannot be read


@pytest.mark.parametrize(
    ("name", "content", "line", "num_rows"),
    [
        ("a.json", b'[\n{"a": 1},\n{"b": }\n]', 3, 1),
        ("a.json", b'[\n{"a": 1}\n{"b": 2}\n]', 3, 1),
        ("a.json", b'[\n{"a": 1}', 2, 1),
        ("a.json", b'[\n{"a": 1},\n]', 3, 1),
        ("a.json", b'[\n{"a": 1},\n{"b": "cut o', 3, 1),
        ("a.json", b'[{"a": 1}]\ntrailing', 2, 1),
        ("a.json", b'[{"a": 1},\n\xff\n{"a": 1}]', 2, 1),
        ("a.json", b'[{"a": 1},\n' + b"[" * 100_000, 2, 1),
        ("a.json", b'[{"a": 1},\n' + b"9" * 5000 + b"]", 2, 1),
        ("a.json", b'{\n"data": [{"a": 1}]}', 1, 0),
        ("a.json", b'"text"', 1, 0),
        ("a.json", b"", 1, 0),
        ("a.json", b" \n", 1, 0),
        ("a.csv", b'a,"b\n1,2\n', 1, 0),
        ("a.csv", b"a,\xff\n1,2\n", 1, 0),
        ("a.csv", b"\na,b,a\n1,2,3\n", 2, 0),
        ("a.csv", b"a,b\r1,2\r", 1, 0),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), 1, 0),
        ("a.json", '[{"a": 1}]\n'.encode("utf-16"), 1, 0),
        ("a.tsv", "a\tb\n".encode("utf-16"), 1, 0),
        ("a.csv.zst", b"a,b\n1,2\n", 1, 0),
    ],
)
def test_what_makes_the_rest_of_a_file_unreadable_is_one_error_with_its_line(tmp_path, name, content, line, num_rows):
    path = tmp_path / name
    path.write_bytes(content)
    rows, error = rows_until_error(path)
    assert error is not None and error.hint
    assert error.where == f"{path}:{line}"
    assert len(rows) == num_rows


@pytest.mark.parametrize("kind", [".parquet", ".feather", ".arrow"])
def test_a_damaged_file_of_columns_is_one_error(tmp_path, kind):
    path = write(tmp_path / f"pairs{kind}", ROWS)
    path.write_bytes(path.read_bytes()[:-40])
    rows, error = rows_until_error(path)
    assert error is not None and "cannot be read" in error.what
    assert error.where == f"{path}:row {len(rows) + 1}"
    assert [row.values for row in rows] == ROWS[: len(rows)]
    assert len(rows) == (2 if kind == ".arrow" else 0)  # A stream is whole batch by batch.


@pytest.mark.parametrize("kind", [".parquet", ".feather"])
def test_columns_of_one_name_are_an_error(tmp_path, kind):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    path = tmp_path / f"pairs{kind}"
    if kind == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match="two columns are called `a`"):
        list(read(path))


def test_a_column_s_name_controls_no_terminal(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("\x1b[31ma,\x1b[31ma\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        list(read(path))
    assert caught.value.what == "two columns are called `\\x1b[31ma`"


def test_everything_before_the_end_of_a_truncated_gz_file_is_read(tmp_path):
    rows = [{"a": str(number) * 20} for number in range(300)]
    whole = gzip.compress(as_lines(rows).encode())
    path = tmp_path / "pairs.jsonl.gz"
    for cut in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:cut])
        found, error = rows_until_error(path)
        num_whole = zlib.decompressobj(wbits=31).decompress(whole[:cut]).count(b"\n")
        assert [row.values for row in found] == rows[:num_whole]
        assert error is None or error.where == f"{path}:{num_whole + 1}"
        assert error is not None or not cut


@pytest.mark.parametrize("kind", [".jsonl.zst", ".json.zst", ".csv.zst", ".csv.gz", ".json.gz"])
def test_what_a_truncated_file_gives_is_its_beginning_and_an_error(tmp_path, kind):
    digits = random.Random(0)
    rows = [{"a": str(digits.getrandbits(8000))} for _ in range(300)]
    whole = write(tmp_path / f"whole{kind}", rows).read_bytes()
    path = tmp_path / f"pairs{kind}"
    for share in (0, 0.5, 0.75):
        path.write_bytes(whole[: int(share * len(whole)) + 1])
        found, error = rows_until_error(path)
        assert error is not None and re.fullmatch(rf"{re.escape(str(path))}:\d+", error.where or "")
        assert [row.values for row in found] == rows[: len(found)]
        # Zstandard unpacks blocks of 128 KiB as a whole.
        assert share * len(rows) - 60 < len(found) <= share * len(rows) + 1


def test_a_compressed_file_in_several_parts_is_read_as_one(tmp_path):
    for packed in (".gz", ".zst"):
        path = tmp_path / f"pairs.jsonl{packed}"
        path.write_bytes(b"".join(PACKERS[packed](as_lines([row]).encode()) for row in ROWS))
        assert [row.values for row in read(path)] == ROWS


def test_a_table_written_by_the_csv_module_is_read_back(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert [row.values for row in read(path)] == ROWS
