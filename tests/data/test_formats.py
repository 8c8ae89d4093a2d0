"""A row becomes a pair, or is refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_cli.data.formats import FORMATS, instruction, read_pair
from dpo_cli.data.records import BadRow
from tests.conftest import ROW_OF

GOOD = ROW_OF["instruction"] | {"extra": 5}


def test_prompt_input_and_responses_are_told_apart():
    pair = instruction(GOOD, "a.jsonl:1")
    assert (pair.prompt.content, pair.prompt.input, pair.prompt.text) == ("Add.", "1 2", "Add.\n1 2")
    assert (pair.chosen.text, pair.rejected.text, pair.origin) == ("3", "4", "a.jsonl:1")


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_an_input_that_is_empty_leaves_no_trace(given):
    row = {name: value for name, value in GOOD.items() if name != "input"} | given
    assert instruction(row, "a:1").prompt.text == "Add."


@pytest.mark.parametrize(
    ("change", "reason", "detail", "structural"),
    [
        ({"chosen": None}, "missing field", "`chosen` is null", True),
        ({"chosen": 5}, "wrong type", "`chosen` is a number instead of text", True),
        ({"chosen": True}, "wrong type", "`chosen` is true or false instead of text", True),
        ({"rejected": ["a"]}, "wrong type", "`rejected` is a list instead of text", True),
        ({"rejected": {"a": 1}}, "wrong type", "`rejected` is an object instead of text", True),
        ({"input": 7}, "wrong type", "`input` is a number instead of text", True),
        ({"instruction": " "}, "empty field", "`instruction` is empty", True),
        ({"instruction": "\ud800"}, "undecodable text", "half of a surrogate pair", True),
        ({"chosen": "\n"}, "empty response", "`chosen` is empty", False),
        ({"rejected": ""}, "empty response", "`rejected` is empty", False),
        ({"rejected": "3"}, "identical responses", "the same text", False),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(change, reason, detail, structural):
    with pytest.raises(BadRow) as caught:
        instruction(GOOD | change, "a:1")
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    assert caught.value.structural is structural


def test_a_missing_field_lists_what_the_row_has():
    with pytest.raises(BadRow, match=r"`chosen` is missing; the row has `prompt`, `instruction`"):
        instruction({"prompt": "x", "instruction": "y"}, "a:1")


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize(
    ("given", "weight", "margin"),
    [
        ({}, 1, 0),
        ({"weight": None, "margin": None}, 1, 0),
        ({"weight": 0, "margin": -3}, 0, -3),
        ({"weight": 2.5}, 2.5, 0),
        ({"margin": 0.1}, 1, float(np.float32(0.1))),
    ],
)
def test_a_row_of_every_shape_may_have_a_weight_and_a_margin(shape, given, weight, margin):
    pair = read_pair(FORMATS[shape], ROW_OF[shape] | given, "a:1")
    assert (pair.weight, pair.margin) == (weight, margin)
    assert (type(pair.weight), type(pair.margin)) == (float, float)


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (True, "wrong type", "is true or false instead of a number"),
        ("2", "wrong type", "is text instead of a number"),
        ([2], "wrong type", "is a list instead of a number"),
        (float("nan"), "number out of range", "is not finite"),
        (float("-inf"), "number out of range", "is not finite"),
        (1e39, "number out of range", "is not finite as a number of 32 bits"),
        (10**400, "number out of range", "is not finite as a number of 32 bits"),
    ],
)
def test_a_weight_or_margin_that_is_no_finite_number_is_refused(shape, name, value, reason, detail):
    with pytest.raises(BadRow) as caught:
        read_pair(FORMATS[shape], ROW_OF[shape] | {name: value}, "a:1")
    assert (caught.value.reason, caught.value.structural) == (reason, True)
    assert f"`{name}` {detail}" in caught.value.detail


@pytest.mark.parametrize("shape", FORMATS)
def test_a_margin_may_be_negative_and_a_weight_may_not(shape):
    assert read_pair(FORMATS[shape], ROW_OF[shape] | {"margin": -0.5}, "a:1").margin == -0.5
    with pytest.raises(BadRow, match="`weight` is negative"):
        read_pair(FORMATS[shape], ROW_OF[shape] | {"weight": -0.5}, "a:1")
