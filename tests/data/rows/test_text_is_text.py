"""An answer that happens to be JSON is the text that it is, in every file that has lists and objects of its own."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.data.pairs.detection import detect
from dpo_cli.data.pairs.pairing import gather
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import Message, Row
from dpo_cli.errors import UserError
from tests.conftest import write_rows
from tests.data.data_files import read

ANSWERS = [
    '{"role": "engineer", "name": "X"}',
    '{"value": 42, "unit": "km"}',
    '{"role": "user", "content": "A river?"}',
    '{"name": "f", "content": [{"type": "text", "text": "x"}]}',
    '[{"role": "assistant", "content": "Elbe"}]',
    '[{"from": "gpt", "value": "Elbe"}]',
    "[1, 2]",
    '["a"]',
    "{'role': 'user'}",
    "[",
    '"quoted"',
    "null",
]
ASKED = {"role": "user", "content": "Give me JSON."}


def in_every_shape(answer, other):
    """Spell one pair in every shape in which an answer may be text."""
    asked = ASKED["content"]
    return {
        "text": [{"prompt": asked, "chosen": answer, "rejected": other}],
        "instruction": [{"instruction": asked, "chosen": answer, "rejected": other}],
        "sharegpt": [{"conversations": [{"from": "human", "value": asked}], "chosen": answer, "rejected": other}],
        "ranked": [{"prompt": asked, "responses": [answer, other], "scores": [2, 1]}],
        "unpaired": [
            {"prompt": asked, "completion": answer, "label": True},
            {"prompt": asked, "completion": other, "label": False},
        ],
        "messages": [
            {
                name: [turn]
                for name, turn in zip(
                    ("prompt", "chosen", "rejected"), (ASKED, *map(said, (answer, other))), strict=True
                )
            }
        ],
    }


def said(text):
    return {"role": "assistant", "content": text}


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    return path


def write_list(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


WRITERS = {".jsonl": write_rows, ".json": write_list, ".parquet": write_parquet, ".arrow": write_arrow}


def pairs_of(rows, scratch):
    rows = list(rows)
    shape = detect(rows, "f")
    gathered = FORMATS[shape].gather(iter(rows), scratch) if FORMATS[shape].gather else rows
    return shape, [pair for row in gathered for pair in read_pairs(FORMATS[shape], row)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("shape", in_every_shape("", ""))
def test_an_answer_that_is_json_is_text_in_a_file_with_objects(tmp_path, kind, shape):
    for number, answer in enumerate(ANSWERS):
        path = WRITERS[kind](tmp_path / f"{number}{kind}", in_every_shape(answer, "no")[shape])
        found, (pair,) = pairs_of(read(path), tmp_path)
        assert found == shape
        assert (pair.chosen, pair.rejected) == ((Message("assistant", answer),), (Message("assistant", "no"),))


def test_a_prompt_that_is_the_json_of_messages_is_text_as_well(tmp_path):
    row = {"prompt": json.dumps([ASKED]), "responses": ["a", "b"], "scores": [1, 2]}
    _, (pair,) = pairs_of(read(write_rows(tmp_path / "rows.jsonl", [row])), tmp_path)
    assert pair.prompt == (Message("user", json.dumps([ASKED])),)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({n: v if isinstance(v, str) else json.dumps(v) for n, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("shape", in_every_shape("", ""))
def test_a_csv_file_may_hold_lists_and_objects_and_answers_that_are_json_all_the_same(tmp_path, shape):
    for number, answer in enumerate(('{"role": "engineer", "name": "X"}', '{"value": 42}', "[1, 2]", "{'a': 1}")):
        path = write_csv(tmp_path / f"{number}.csv", in_every_shape(answer, "no")[shape])
        found, (pair,) = pairs_of(read(path), tmp_path)
        assert found == shape
        assert pair.chosen == (Message("assistant", answer),)


def test_the_cells_of_answers_that_are_paired_hold_objects_too(tmp_path):
    rows = [
        {"prompt": [ASKED], "completion": said("a"), "label": True},
        {"prompt": [ASKED], "completion": "b", "label": False},
    ]
    (row,) = gather(read(write_csv(tmp_path / "rows.csv", rows)), tmp_path)
    (pair,) = read_pairs(FORMATS["unpaired"], row)
    assert (pair.chosen, pair.rejected) == ((Message("assistant", "a"),), (Message("assistant", "b"),))


@pytest.mark.parametrize(
    "row",
    [
        {
            "chosen": json.dumps([ASKED, said("a")]),
            "rejected": json.dumps([ASKED, said("b")]),
            "prompt": json.dumps([ASKED]),
        },
        {"prompt": json.dumps([ASKED]), "chosen": json.dumps([said("a")]), "rejected": json.dumps([said("b")])},
    ],
)
def test_conversations_written_as_json_text_throughout_are_no_texts(row):
    with pytest.raises(UserError, match="written as JSON text") as caught:
        detect([Row("f:1", row)], "f")
    assert "data.format: text" in caught.value.hint


def test_a_late_row_with_json_in_the_place_of_messages_says_so(tmp_path):
    row = {"prompt": [ASKED], "chosen": json.dumps([said("a")]), "rejected": 5}
    with pytest.raises(Exception, match="`chosen` is JSON written as text instead of a list of messages"):
        read_pairs(FORMATS["conversations"], Row("f:1", row))


@pytest.mark.parametrize("arguments", ['{"enable_thinking": false}', {"enable_thinking": False}])
def test_what_is_never_text_may_be_json_text_in_any_file(arguments):
    tool = {"type": "function", "function": {"name": "f"}}
    row = in_every_shape("a", "b")["text"][0] | {"tools": json.dumps([tool]), "chat_template_kwargs": arguments}
    (pair,) = read_pairs(FORMATS["text"], Row("f:1", row))
    assert pair.arguments == {"tools": [tool], "enable_thinking": False}
