"""The shape of a source is that of most of its rows, and never that of the first alone."""

from __future__ import annotations

import itertools
import json

import pytest

from dpo_cli.data.pairs.detection import detect
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import Row
from dpo_cli.errors import UserError
from tests.conftest import ROW_OF

TURN = {"role": "user", "content": "x"}


def rows_of(*values):
    return [Row(f"f:{line}", row) for line, row in enumerate(values, 1)]


@pytest.mark.parametrize("shape", FORMATS)
def test_a_good_row_fits_its_own_shape_and_no_other(shape):
    assert [name for name, other in FORMATS.items() if other.fits(ROW_OF[shape])] == [shape]


@pytest.mark.parametrize("shape", FORMATS)
def test_the_example_of_the_docs_fits_its_own_shape_and_no_other(shape):
    assert [name for name, other in FORMATS.items() if other.fits(FORMATS[shape].example)] == [shape]


@pytest.mark.parametrize(("first", "shape"), [*itertools.permutations(FORMATS, 2)])
def test_the_first_row_does_not_decide(first, shape):
    assert detect(rows_of(ROW_OF[first], ROW_OF[shape], ROW_OF[shape]), "f") == shape


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("damage", [None, 5, "", [], {}, "text"])
def test_damaged_rows_do_not_hide_the_shape_of_the_others(shape, damage):
    broken = dict.fromkeys(ROW_OF[shape], damage)
    assert (
        detect([Row("f:0", None, "the row is not valid JSON"), *rows_of(broken, ROW_OF[shape], ROW_OF[shape])], "f")
        == shape
    )


@pytest.mark.parametrize("shape", FORMATS)
def test_columns_that_no_shape_asks_for_do_not_matter(shape):
    others = {"id": 7, "messages": [{"role": "user", "content": "x"}], "score_chosen": 8.5, "source": "a", "meta": {}}
    assert detect(rows_of(ROW_OF[shape] | others), "f") == shape


def test_of_two_shapes_that_fit_as_often_the_first_in_the_table_is_taken():
    assert detect(rows_of(ROW_OF["text"], ROW_OF["instruction"]), "f") == "instruction"
    both = ROW_OF["text"] | ROW_OF["instruction"]
    assert detect(rows_of(both), "f") == "instruction"


def test_rows_of_no_shape_are_told_by_their_columns_and_kinds():
    rows = rows_of({"question": "a", "good": ["b"], "bad": None}, {"question": "c", "good": "d", "n": 1})
    with pytest.raises(UserError) as caught:
        detect(rows, "data/pairs.jsonl")
    error = caught.value
    assert error.where == "data/pairs.jsonl"
    assert "`question` (text), `good` (a list or text), `bad` (null), `n` (a number)" in error.what
    assert "`data.columns: {" in error.hint


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": [{"text": "a"}], "chosen": [{"text": "b"}], "rejected": [{"text": "c"}]}, "messages"),
        ({"prompt": "a", "chosen": [{"text": "b"}], "rejected": [{"text": "c"}]}, "repeated"),
        ({"prompt": "a", "chosen": 1, "rejected": 2}, "text"),
    ],
)
def test_rows_with_the_columns_of_several_shapes_are_read_as_the_nearest_by_their_kinds(row, shape):
    assert detect(rows_of(row), "f") == shape


@pytest.mark.parametrize("last", ["user", "assistant"])
def test_a_copy_of_a_conversation_in_messages_does_not_make_it_a_prompt(last):
    copy = [{"role": "user", "content": "x"}, {"role": last, "content": "y"}]
    assert detect(rows_of(ROW_OF["conversations"] | {"messages": copy}), "f") == "conversations"
    assert detect(rows_of(ROW_OF["repeated"] | {"messages": copy}), "f") == "repeated"


@pytest.mark.parametrize("row", [ROW_OF["conversations"], {"messages": [TURN], "chosen": "a", "rejected": "b"}])
def test_lists_written_as_json_text_are_what_differs(row):
    with pytest.raises(UserError) as caught:
        detect(rows_of({n: v if isinstance(v, str) else json.dumps(v) for n, v in row.items()}), "f")
    written = [name for name, value in row.items() if not isinstance(value, str)]
    assert all(f"`{name}`" in caught.value.hint for name in written)
    assert "written as JSON text" in caught.value.hint


def test_messages_that_end_with_an_answer_are_what_differs():
    turns = [TURN, {"role": "assistant", "content": "y"}]
    with pytest.raises(UserError) as caught:
        detect(rows_of({"messages": turns, "chosen": turns[1], "rejected": "z"}), "f")
    assert "`messages` is a prompt if its last turn is not the assistant's" in caught.value.hint


@pytest.mark.parametrize("asked", [{"prompt": "Q"}, {"prompt": TURN}, {"prompt": [TURN]}, {"instruction": "Q"}])
@pytest.mark.parametrize("answers", list(itertools.product(("text", "message", "list"), repeat=2)))
def test_answers_may_be_text_messages_or_lists_beside_any_prompt(asked, answers):
    forms = [{"text": said, "message": (one := {"role": "assistant", "content": said}), "list": [one]} for said in "ab"]
    row = asked | {name: form[kind] for name, form, kind in zip(("chosen", "rejected"), forms, answers, strict=True)}
    (pair,) = read_pairs(FORMATS[detect(rows_of(row), "f")], Row("f:1", row))
    assert [[m.content for m in turns] for turns in (pair.chosen, pair.rejected)] == [["a"], ["b"]]
    assert [m.content for m in pair.prompt] == ["x" if asked.get("prompt", "Q") != "Q" else "Q"]


def test_a_row_of_a_thousand_strange_columns_is_told_in_one_line():
    with pytest.raises(UserError) as caught:
        detect(rows_of({f"column {n} \ud800": n for n in range(1000)}), "f")
    assert len(caught.value.what.encode()) < 1000
    assert "… and 988 more" in caught.value.what


def test_a_column_s_name_controls_no_terminal():
    with pytest.raises(UserError) as caught:
        detect(rows_of({"\x1b[31mred": 1}), "f")
    assert "`\\x1b[31mred` (a number)" in caught.value.what


def test_where_no_row_could_be_read_the_shape_does_not_matter():
    assert detect([Row("f:1", None, "the row is not valid JSON")], "f") in FORMATS
    assert detect([], "f") in FORMATS
