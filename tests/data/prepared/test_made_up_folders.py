"""Prepared pairs that somebody made up, with digests that fit, are refused before anything is read."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from dpo_cli.data.prepared.columns import SCHEMA
from dpo_cli.data.prepared.folder import PAIRS, PreparedPairs
from dpo_cli.system.storage import MANIFEST, DamagedFolder, sealed_folder
from tests.builders import prepare_pairs
from tests.conftest import ROW_OF, write_rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("whole")
    rows = [ROW_OF["text"], {**ROW_OF["text"], "chosen": "Three, of course."}]
    return prepare_pairs(write_rows(folder / "pairs.jsonl", rows), tokenizer, folder / "prepared")


def made_up(whole, folder, data: bytes | None = None, **facts):
    """Write a folder with other bytes or facts, sealed as if `prepare-data` had written it."""
    known = {name: value for name, value in whole.manifest.items() if name != "files"}
    with sealed_folder(folder, {**known, **facts}) as temporary:
        (temporary / PAIRS).write_bytes(data or whole._files[0].read_bytes())
    return folder


def with_columns(whole, **columns) -> bytes:
    """Return the file of the same pairs with other columns."""
    table = pa.table({name: whole._table.column(name) for name in SCHEMA.names}, SCHEMA)
    for name, values in columns.items():
        place = SCHEMA.get_field_index(name)
        table = table.set_column(place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_what_preparing_wrote_is_opened(whole, tmp_path):
    assert list(map(str, PreparedPairs.open(made_up(whole, tmp_path / "p")))) == list(map(str, whole))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"chosen": [[1, -2], [3]]}, "tokens below 0"),
        ({"rejected": [[], [3]]}, "texts without tokens"),
        ({"prompt": [[1], None]}, "values are missing"),
        ({"prompt": [[1], [2, None]]}, "values are missing"),
        ({"origin": ["a", None]}, "values are missing"),
        ({"chosen_gaps": [[0, 1, 2], []]}, "lie outside"),
        ({"chosen_gaps": [[2, 1], []]}, "lie outside"),
        ({"chosen_gaps": [[0, 10_000], []]}, "lie outside"),
        ({"rejected_gaps": [[-1, 1], []]}, "lie outside"),
        ({"weight": [1, -1]}, "weights or margins"),
        ({"weight": [1, np.nan]}, "weights or margins"),
        ({"margin": [np.inf, 0]}, "weights or margins"),
    ],
)
def test_rows_that_nothing_prepares_are_refused(whole, tmp_path, columns, said):
    with pytest.raises(DamagedFolder, match=said):
        PreparedPairs.open(made_up(whole, tmp_path / "p", with_columns(whole, **columns)))


def test_a_row_of_gaps_ends_where_the_next_begins(whole, tmp_path):
    columns = {"chosen_gaps": [[1, 2], [0, 1]], "rejected_gaps": [[], [0, 1]]}
    pairs = PreparedPairs.open(made_up(whole, tmp_path / "p", with_columns(whole, **columns)))
    assert [pair.chosen_gaps.tolist() for pair in pairs] == [[1, 2], [0, 1]]


def test_offsets_that_lead_out_of_the_file_are_refused(whole, tmp_path):
    """Arrow would follow them to wherever they lead."""
    data = whole._files[0].read_bytes()
    lengths = np.cumsum([0, *(len(pair.prompt) for pair in whole)], dtype=np.int32).tobytes()
    assert data.count(lengths) == 1
    false = np.array([0, 10, 2**30], np.int32).tobytes()
    with pytest.raises(DamagedFolder, match=PAIRS):
        PreparedPairs.open(made_up(whole, tmp_path / "p", data.replace(lengths, false)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fingerprint",), 5),
        (("settings",), None),
        (("settings",), {"data.format": ["auto"]}),
        (("statistics",), []),
        (("statistics", "sources"), []),
        (("statistics", "sources", 0, "rows"), "2"),
        (("statistics", "rows_read"), -1),
        (("statistics", "pairs_kept"), 1),
        (("statistics", "dropped"), {"too long": 0}),
        (("statistics", "examples"), {"too long": ["a:1: too long"]}),
        (("statistics", "truncated"), None),
        (("statistics", "rewritten"), -1),
        (("statistics", "tokens", "prompt"), {"min": 1}),
        (("statistics", "tokens", "chosen", "max"), float("1e400")),
        (("statistics", "too_long"), {"prompt": []}),
        (("statistics", "too_long", "longest"), [[1025]]),
        (("statistics", "too_long", "longest"), [[1025, -1]]),
    ],
)
def test_a_manifest_that_says_what_no_preparing_says_is_refused(whole, tmp_path, place, value):
    folder = made_up(whole, tmp_path / "p")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    group = manifest
    for name in place[:-1]:
        group = group[name]
    group[place[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DamagedFolder, match=MANIFEST):
        PreparedPairs.open(folder)
