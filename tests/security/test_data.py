"""A data file takes no more time and memory than its rows deserve, and leads nowhere that was not named."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.data.pairs.sources import Source, check_source, read_rows
from dpo_cli.data.records import Row
from dpo_cli.data.rows import streams
from dpo_cli.data.rows.files import reader_of
from dpo_cli.errors import UserError
from dpo_cli.system.storage import DamagedFolder, verify
from tests.cli.test_bad_inputs import PREPARE
from tests.security.conftest import within

ROW = json.dumps({"prompt": "Say hi.", "chosen": "Hi.", "rejected": "Well, hi, then."}) + "\n"
MEGABYTE = 1 << 20


def rows_of(path: Path) -> list[Row]:
    reader = reader_of(path)
    assert reader is not None
    return list(reader(path))


def sparse(name: str, start: str, size: int, end: str = "") -> Path:
    """Write a file that is zeros but for its ends, and takes no room on the disk."""
    path = Path(name)
    with path.open("wb") as file:
        file.write(start.encode())
        file.truncate(size)
        file.seek(0, io.SEEK_END)
        file.write(end.encode())
    return path


def test_a_line_of_a_gigabyte_is_a_broken_row_and_the_next_is_read(project):
    path = sparse("long.jsonl", ROW + '{"prompt": "', 1 << 30, '"}\n' + ROW)
    with within(20, megabytes=300):
        good, long, last = rows_of(path)
    assert good.values == last.values
    assert long.values is None


def test_a_line_without_an_end_ends_the_reading(project, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 200 * MEGABYTE)
    path = sparse("endless.jsonl", '{"prompt": "', 1 << 40)
    with within(20, megabytes=300), pytest.raises(UserError, match="has no end within") as found:
        rows_of(path)
    assert found.value.where == "endless.jsonl:1"


@pytest.mark.parametrize("name", ["long.json", "long.csv"])
def test_a_value_of_a_gigabyte_is_refused_in_any_text_format(project, monkeypatch, name):
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 16 * MEGABYTE)
    start = "prompt,chosen,rejected\n" if name.endswith("csv") else '[{"prompt": '
    path = sparse(name, start + '"', 1 << 30)
    with within(20, megabytes=700):
        try:
            assert [row for row in rows_of(path) if row.values] == []
        except UserError as error:
            assert error.hint


@pytest.mark.parametrize("opening", ["[", '{"a":'], ids=["lists", "objects"])
@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_nesting_of_a_hundred_thousand_is_an_error(project, dpo, opening, name):
    Path(name).write_text(("[" if name.endswith("json") else ROW) + opening * 100_000 + "\n")
    with within(5, megabytes=200):
        result = dpo(f"{PREPARE} data.train={name}")
    assert result.status == 2
    assert "nested too deeply" in result.errors[0][0]


@pytest.mark.parametrize("number", ["1" * 10_000_000, "1." + "1" * 10_000_000, "1e" + "9" * 10_000_000])
@pytest.mark.parametrize("name", ["digits.jsonl", "digits.csv"])
def test_numbers_of_ten_million_digits_are_read_or_refused(project, number, name):
    row = ROW.strip().replace("}", f', "weight": {number}}}')
    Path(name).write_text(row if name.endswith("jsonl") else f"prompt,chosen,rejected,weight\na,b,c,{number}\n")
    with within(5, megabytes=300):
        assert len(rows_of(Path(name))) == 1


def packed_zeros(name: str, size: int) -> Path:
    kind = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[Path(name).suffix]
    with pa.OSFile(name, "wb") as file, pa.CompressedOutputStream(file, kind) as packed:
        for _ in range(size // MEGABYTE):
            packed.write(bytes(MEGABYTE))
    return Path(name)


@pytest.mark.parametrize(
    "name", ["bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz", "bomb.jsonl.zst", "bomb.csv.zst", "bomb.jsonl.bz2"]
)
def test_a_compressed_bomb_is_refused(project, monkeypatch, name):
    for limit, size in (("MAX_ROW_BYTES", 2), ("MAX_LINE_BYTES", 16), ("FREE_BYTES", 8)):
        monkeypatch.setattr(streams, limit, size * MEGABYTE)
    path = packed_zeros(name, 64 * MEGABYTE)
    with within(10, megabytes=300):
        try:
            assert [row for row in rows_of(path) if row.values] == []
        except UserError as error:
            assert error.hint


def test_rows_by_the_million_out_of_next_to_nothing_are_refused(project, monkeypatch):
    monkeypatch.setattr(streams, "FREE_BYTES", MEGABYTE)
    monkeypatch.setattr(streams, "MAX_RATIO", 500)
    with pa.OSFile("rows.jsonl.zst", "wb") as file, pa.CompressedOutputStream(file, "zstd") as packed:
        for _ in range(40):
            packed.write((ROW * (MEGABYTE // len(ROW))).encode())
    reader = reader_of(Path("rows.jsonl.zst"))
    assert reader is not None
    with within(30, megabytes=300), pytest.raises(UserError, match="more than 500 times its size"):
        for row in reader(Path("rows.jsonl.zst")):
            assert row.values


def test_a_file_of_ordinary_rows_that_is_packed_well_is_read(project):
    rows = 30_000
    Path("repetitive.jsonl.gz").write_bytes(gzip.compress((ROW * rows).encode()))
    assert Path("repetitive.jsonl.gz").stat().st_size * 100 < len(ROW) * rows
    assert sum(row.values is not None for row in rows_of(Path("repetitive.jsonl.gz"))) == rows


def column_of(length: int, repeated: int = 1) -> pa.Table:
    """Return a table whose prompts are all the same long text, which is there once."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * repeated, pa.int32()), pa.array(["x" * length]))
    return pa.table({"prompt": prompts, "chosen": ["b"] * repeated, "rejected": ["c"] * repeated})


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_columns_that_grow_out_of_all_proportion_are_refused_or_read_in_bounded_memory(project, monkeypatch, ending):
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 16 * MEGABYTE)
    monkeypatch.setattr("dpo_cli.data.rows.column_files.MAX_BATCH_BYTES", 200 * MEGABYTE)
    path, table = Path(f"bomb.{ending}"), column_of(8 * MEGABYTE, repeated=200)
    if ending == "parquet":
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    reader, num_rows = reader_of(path), 0
    assert reader is not None
    with within(20, megabytes=600):
        try:
            for row in reader(path):
                num_rows += row.values is not None
        except UserError as error:
            assert error.hint
        else:
            assert num_rows == 200


def test_two_thousand_million_rows_in_a_kilobyte_are_refused(project, monkeypatch):
    monkeypatch.setattr("dpo_cli.data.rows.column_files.FREE_ROWS", 10_000)
    column = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))
    batch = pa.record_batch({"prompt": column, "chosen": column, "rejected": column})
    with pa.OSFile("rows.arrow", "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    with within(20, megabytes=300), pytest.raises(UserError, match=r"more than [\d,]+ rows in"):
        rows_of(Path("rows.arrow"))


def archived(name: str) -> None:
    """Put pairs into an archive or pack them as nobody reads them, members that lead outside included."""
    data, outside = ROW.encode(), "../../outside.jsonl"
    if name.endswith("zip"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr(outside, data)
    elif ".tar" in name:
        with tarfile.open(name, "w:gz" if name.endswith("gz") else "w") as archive:
            member = tarfile.TarInfo(outside)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    else:
        Path(name).write_bytes(lzma.compress(data))


@pytest.mark.parametrize("name", ["pairs.zip", "pairs.tar", "pairs.tar.gz", "pairs.jsonl.xz"])
def test_archives_are_not_opened(project, dpo, name):
    archived(name)
    result = dpo(f"{PREPARE} data.train={name}")
    assert result.status == 2
    assert re.search("not a data file of a known type|is a tar archive", result.errors[0][0])
    assert not Path("../../outside.jsonl").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_that_leads_outside_its_folder_is_no_manifest(project, name):
    Path("outside").write_text("x")
    Path("sealed").mkdir()
    Path("sealed/manifest.json").write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": "0" * 64}}}))
    with pytest.raises(DamagedFolder, match="outside"):
        verify(Path("sealed"))


def test_a_manifest_that_names_what_is_no_name_is_damage(project):
    Path("sealed").mkdir()
    Path("sealed/manifest.json").write_text(json.dumps({"files": {"a\0b": {"bytes": 1, "sha256": "0" * 64}}}))
    with pytest.raises(DamagedFolder):
        verify(Path("sealed"))


def test_a_folder_of_datasets_does_not_list_files_elsewhere(project):
    Path("saved").mkdir()
    Path("saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../pairs.jsonl"}]}))
    assert check_source(Source(path="saved")) is not None


def test_links_are_followed_where_the_user_named_them(project):
    Path("link.jsonl").symlink_to("pairs.jsonl")
    assert len(list(read_rows(Source(path="link.jsonl")))) == len(Path("pairs.jsonl").read_text().splitlines())


def test_a_run_goes_where_the_link_leads_and_removes_only_its_own_files(project, dpo):
    Path("elsewhere").mkdir()
    Path("elsewhere/essay.txt").write_text("All that I wrote.")
    Path("runs").mkdir()
    Path("runs/run").symlink_to(Path("elsewhere").absolute())
    result = dpo("train --config run.yaml --overwrite")
    assert result.status == 2
    assert "contains other files" in result.errors[0][0]
    assert Path("elsewhere/essay.txt").read_text() == "All that I wrote."
