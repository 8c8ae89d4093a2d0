"""Each kind of data file, as the first and only thing that a process of the program reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_config
from tests.data.data_files import COLUMNS, KINDS, ROWS, write

DPO = Path(sys.executable).parent / "dpo"


def saved_dataset(rows: list[dict[str, Any]], folder: Path) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(folder)


def folder_of_columns(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir()
    write(folder / "a.parquet", rows[:1])
    write(folder / "b.arrow", rows[1:])


def wide_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write so many columns that each could have a thread of its own."""
    beside = {f"column {number}": "text" for number in range(300)}
    pq.write_table(pa.Table.from_pylist([{**row, **beside} for row in rows]), path)


WRITERS = {
    **{f"pairs{kind}": write_kind for kind, write_kind in COLUMNS.items()},
    "wide.parquet": wide_parquet,
    "folder": folder_of_columns,
    "saved": saved_dataset,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return make_config(tmp_path_factory.mktemp("project"), tiny_llama, Path("pairs.jsonl"), data={"eval": None})


def started(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a program of which the surroundings decide nothing about Arrow."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("ARROW")}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=surroundings, capture_output=True, text=True, check=False
    )


def num_pairs(folder: Path) -> int:
    manifest = json.loads((folder / "prepared/manifest.json").read_text(encoding="utf-8"))
    return int(manifest["statistics"]["pairs_kept"])


def written(name: str, folder: Path) -> int:
    """Write a source; return how many rows it has."""
    if "*" in name:
        folder_of_columns(ROWS, folder / "folder")
        shutil.copy(folder / "folder/a.parquet", folder / "folder/c.parquet")
        return 2
    WRITERS[name](ROWS, folder / name) if name in WRITERS else write(folder / name, ROWS)
    return len(ROWS)


@pytest.mark.parametrize("name", ["pairs.parquet", "saved", "pairs.jsonl.zst"])
def test_a_source_is_prepared_by_a_process_that_has_read_nothing_else(config, tmp_path, name):
    num_rows = written(name, tmp_path)
    options = ("--config", config, f"data.train={name}", "--out", "prepared")
    ended = started(DPO, "prepare-data", *options, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert num_pairs(tmp_path) == num_rows


READING = """
import sys
from dpo_cli.data.pairs.sources import as_sources, read_rows
print([row.problem for source in as_sources(sys.argv[1]) for row in read_rows(source)])
"""
"""What the program does with a source before rows become pairs, which is the same for all; it takes a tenth as long."""


@pytest.mark.parametrize("name", [*WRITERS, "pairs.jsonl.zst", "folder/*.parquet"])
def test_a_source_is_read_by_a_process_that_has_read_nothing_else(tmp_path, name):
    num_rows = written(name, tmp_path)
    ended = started(sys.executable, "-c", READING, name, folder=tmp_path)
    assert ended.stdout == f"{[''] * num_rows}\n", ended.stderr


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in COLUMNS])
def test_a_text_file_is_read_by_a_process_that_has_read_nothing_else(config, tmp_path, forked_dpo, kind):
    source = write(tmp_path / f"pairs{kind}", ROWS)
    ended = forked_dpo("prepare-data", "--config", config, f"data.train={source}", "--out", tmp_path / "prepared")
    assert ended.returncode == 0, ended.stderr
    assert num_pairs(tmp_path) == len(ROWS)


IMPORTED_BEFORE = """
import os
os.environ.pop("ARROW_DEFAULT_MEMORY_POOL", None)
import pyarrow
from pathlib import Path
from dpo_cli.data.rows.files import reader_of
print([row.problem for row in reader_of(Path("pairs.parquet"))(Path("pairs.parquet"))])
"""


def test_a_parquet_file_is_read_where_arrow_was_imported_before_the_program(tmp_path):
    write(tmp_path / "pairs.parquet", ROWS)
    command = [sys.executable, "-c", IMPORTED_BEFORE]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout == f"{[''] * len(ROWS)}\n", ended.stderr
