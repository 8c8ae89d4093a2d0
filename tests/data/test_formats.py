"""A row becomes a pair, or is refused with the reason."""

from __future__ import annotations

import pytest

from dpo_cli.data.formats import instruction
from dpo_cli.data.records import BadRow

GOOD = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4", "extra": 5}


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
