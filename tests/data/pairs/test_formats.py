"""A row becomes pairs, or is refused with the reason and the place in it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_cli.data.pairs.messages import CALLERS, ROLES
from dpo_cli.data.pairs.pairing import gather
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import BadRow, Cell, Message, Row
from tests.conftest import ROW_OF

TURN, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi."), ("assistant", "Hello."), ("assistant", "?")))
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}

READABLE = {**ROW_OF, "unpaired": {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4"}}
"""A row of every shape; of unpaired answers, both that become a pair in one."""


def read(shape, row, **settings):
    if shape != "unpaired":
        return read_pairs(FORMATS[shape], Row("a:1", row), **settings)
    answers = [{"completion": row["chosen"], "label": True}, {"completion": row["rejected"], "label": False}]
    with tempfile.TemporaryDirectory() as scratch:
        first, *_ = gather((Row("a:1", row | answer) for answer in answers), Path(scratch))
    return read_pairs(FORMATS[shape], first, **settings)


def only(shape, row):
    (pair,) = read(shape, row)
    return pair


def refusal(shape, row):
    with pytest.raises(BadRow) as caught:
        read(shape, row)
    return caught.value


@pytest.mark.parametrize("given", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_an_input_that_is_empty_leaves_no_trace(given):
    row = {name: value for name, value in ROW_OF["instruction"].items() if name != "input"} | given
    assert only("instruction", row).prompt == (Message("user", "Add."),)


@pytest.mark.parametrize(
    ("shape", "change", "reason", "detail", "structural"),
    [
        ("instruction", {"chosen": None}, "missing field", "`chosen` is null", True),
        ("instruction", {"chosen": 5}, "wrong type", "`chosen` is a number instead of text", True),
        ("instruction", {"chosen": True}, "wrong type", "`chosen` is true or false instead of text", True),
        ("instruction", {"rejected": ["a"]}, "wrong type", "`rejected` is a list instead of text", True),
        ("instruction", {"rejected": {"a": 1}}, "wrong type", "`rejected` is an object instead of text", True),
        ("instruction", {"input": 7}, "wrong type", "`input` is a number instead of text", True),
        ("instruction", {"instruction": " "}, "empty field", "`instruction` is empty", True),
        ("instruction", {"instruction": "\ud800"}, "undecodable text", "half of a surrogate pair", True),
        ("instruction", {"chosen": "\n"}, "empty response", "`chosen` is empty", False),
        ("instruction", {"rejected": ""}, "empty response", "`rejected` is empty", False),
        ("instruction", {"rejected": "3"}, "identical responses", "the same text", False),
        ("instruction", {"system": 1}, "wrong type", "`system` is a number instead of text", True),
        ("instruction", {"history": "x"}, "wrong type", "`history` is text instead of a list of exchanges", True),
        ("instruction", {"history": [["a"]]}, "wrong length", "`history[0]` has 1 texts instead of two", True),
        ("instruction", {"history": [["a", "b"], ["c", 4]]}, "wrong type", "`history[1][1]` is a number", True),
        ("messages", {"prompt": [TURN, GOOD]}, "prompt ends with an answer", "the assistant's", True),
        ("messages", {"chosen": [TURN, GOOD]}, "prompt not repeated", "`chosen` begins with a turn of the user", True),
        ("messages", {"chosen": [GOOD, TURN]}, "no answer", "`chosen` ends with a turn of the user", True),
        ("messages", {"chosen": [BAD, 5]}, "wrong type", "`chosen[1]` is a number instead of an object", True),
        ("messages", {"chosen": [{"role": "robot", "content": ""}]}, "wrong role", "`chosen[0].role` is `robot`", True),
        ("messages", {"chosen": [{"role": 1, "content": ""}]}, "wrong type", "`chosen[0].role` is a number", True),
        ("messages", {"chosen": [{"content": "a"}]}, "missing field", "`chosen[0]` has no `role`", True),
        ("messages", {"chosen": [GOOD, {"role": "gpt"}]}, "missing field", "`chosen[1]` has no `content`", True),
        ("messages", {"chosen": [GOOD | {"content": None}]}, "missing field", "`chosen[0].content` is null", True),
        ("messages", {"chosen": [GOOD | {"content": [{"type": "image_url"}]}]}, "wrong type",
         "`chosen[0].content[0]` is a part of type `image_url`, not `text`", True),
        ("messages", {"chosen": [GOOD | {"tool_calls": "f()"}]}, "wrong type", "`chosen[0].tool_calls` is text", True),
        ("messages", {"chosen": [GOOD | {"tool_calls": [CALL, 1]}]}, "wrong type", "`chosen[0].tool_calls[1]`", True),
        ("messages", {"chosen": [GOOD | {"tool_calls": [{"name": "\udfff"}]}]}, "undecodable text",
         "`chosen[0].tool_calls` has half", True),
        ("messages", {"chosen": [GOOD | {"thinking": 3}]}, "wrong type", "`chosen[0].thinking` is a number", True),
        ("messages", {"chosen": [GOOD, TURN, GOOD | {"content": " "}]}, "empty response",
         "`chosen` is empty in turn 5", False),
        ("messages", {"prompt": [TURN | {"content": " "}]}, "empty field", "no turn of a user", True),
        ("messages", {"prompt": [TURN | {"role": "system"}]}, "empty field", "no turn of a user", True),
        ("repeated", {"prompt": "Add."}, "prompt not repeated", "the user's first turn in `chosen`", True),
        ("repeated", {"rejected": [BAD]}, "prompt not repeated", "the user's first turn in `rejected`", True),
        ("conversations", {"chosen": [TURN, GOOD], "rejected": [TURN | {"content": "Ho."}, BAD]},
         "different contexts", "`chosen` and `rejected` diverge at turn 1", False),
        ("conversations", {"chosen": [GOOD], "rejected": [BAD]}, "empty field", "no turn of a user", True),
        ("hh", {"chosen": "\n\nAssistant: Hi.\n\nHuman: 3"}, "no human turn", "`chosen` does not begin", True),
        ("hh", {"rejected": "Add 1 and 2."}, "no human turn", "`rejected` does not begin with `Human:`", True),
        ("hh", {"rejected": "\n\nHuman: Add 1 and 2."}, "no answer", "`rejected` ends with a turn of the user", True),
        ("hh", {"rejected": "\n\nHuman: Add 1 and 2.\n\nAssistant: "}, "empty response", "`rejected`", False),
        ("hh", {"rejected": "\n\nHuman: Add 2.\n\nAssistant: 3"}, "different contexts", "at turn 1", False),
        ("sharegpt", {"conversations": []}, "empty field", "`conversations` is an empty list", True),
        ("sharegpt", {"chosen": {"from": "human", "value": "3"}}, "prompt not repeated", "`chosen` begins", True),
        ("sharegpt", {"conversations": [{"from": "system", "value": "a"}, TURN], "system": "b"}, "two system prompts",
         "the conversation has one, and the column `system` is another", True),
        ("ranked", {"scores": [1, 2]}, "wrong length", "`scores` has 2 numbers for 3 responses", True),
        ("ranked", {"scores": [1, True, 2]}, "wrong type", "`scores[1]` is true or false", True),
        ("ranked", {"scores": [1, 10**400, 2]}, "number out of range", "`scores[1]` is not finite", True),
        ("ranked", {"scores": [1, 1, 1]}, "no preference", "none of 3 responses is better", False),
        ("ranked", {"responses": ["3"], "scores": [1]}, "no preference", "none of 1 response", False),
        ("ranked", {"responses": [], "scores": []}, "empty field", "`responses` is an empty list", True),
        ("ranked", {"responses": ["4", {"value": 3}, "5"]}, "missing field", "`responses[1]` has no `text`", True),
        ("ranked", {"responses": ["4", "4", "4"]}, "identical responses", "`responses[1]` and `responses[2]`", False),
        ("ranked", {"responses": ["4", 3, "5"]}, "wrong type", "`responses[1]` is a number", True),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_reason_and_the_place_in_it(shape, change, reason, detail, structural):
    bad = refusal(shape, ROW_OF[shape] | change)
    assert (bad.reason, bad.structural) == (reason, structural)
    assert detail in bad.detail


TURNS = {"prompt": [TURN], "chosen": [GOOD], "rejected": [BAD]}
WITHOUT_SYSTEM = [
    *(READABLE | {"messages": TURNS}).items(),
    ("compared", {"messages": [TURN], "response_a": [BAD], "response_b": GOOD, "winner": "response_b"}),
    ("ranked", {"prompt": [TURN], "responses": ["a", "b"], "scores": [1, 2]}),
    ("unpaired", TURNS),
    ("repeated", TURNS | {"prompt": "Hi."}),
]


@pytest.mark.parametrize(("shape", "row"), WITHOUT_SYSTEM)
def test_a_system_prompt_in_a_column_is_the_first_turn_in_every_shape(shape, row):
    without = only(shape, row)
    for nothing in (None, "", " \n"):
        assert only(shape, row | {"system": nothing}) == without
    found = only(shape, row | {"system": "Be kind."})
    assert found.prompt == (Message("system", "Be kind."), *without.prompt)
    assert (found.chosen, found.rejected) == (without.chosen, without.rejected)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("messages", {"prompt": [SYSTEM, TURN], "chosen": [GOOD], "rejected": [BAD]}),
        ("messages", {"prompt": [TURN, SYSTEM], "chosen": [GOOD], "rejected": [BAD]}),
        ("messages", {"prompt": [TURN], "chosen": [GOOD, SYSTEM, GOOD], "rejected": [BAD]}),
        ("repeated", {"prompt": "Hi.", "chosen": [SYSTEM, TURN, GOOD], "rejected": [SYSTEM, TURN, BAD]}),
        ("conversations", {"chosen": [SYSTEM, TURN, GOOD], "rejected": [SYSTEM, TURN, BAD]}),
        ("sharegpt", {"conversations": [SYSTEM, TURN], "chosen": GOOD, "rejected": BAD}),
        ("ranked", {"prompt": [SYSTEM, TURN], "responses": ["a", "b"], "scores": [1, 2]}),
        ("unpaired", {"prompt": [SYSTEM, TURN], "chosen": GOOD, "rejected": BAD}),
    ],
)
def test_two_system_prompts_are_refused_in_every_shape(shape, row):
    assert only(shape, row)
    bad = refusal(shape, row | {"system": "Be kind."})
    assert (bad.reason, bad.structural) == ("two system prompts", True)


def test_a_system_prompt_that_is_told_twice_is_one():
    turns = [{"role": "system", "content": "Be kind."}, *READABLE["messages"]["prompt"]]
    row = READABLE["messages"] | {"prompt": turns}
    assert only("messages", row | {"system": "Be kind."}) == only("messages", row)


OF_TEXT = ("instruction", "text", "ranked", "unpaired")


@pytest.mark.parametrize("shape", OF_TEXT)
def test_a_history_and_an_input_are_read_wherever_the_question_is_text(shape):
    row = {name: value for name, value in READABLE[shape].items() if name != "input"}
    (asked,) = only(shape, row).prompt
    found = only(shape, row | {"history": [["Hello.", "Yes?"]], "input": "Mind the gap.", "system": "Be kind."})
    assert [(turn.role, turn.text) for turn in found.prompt] == [
        ("system", "Be kind."),
        ("user", "Hello."),
        ("assistant", "Yes?"),
        ("user", f"{asked.text}\nMind the gap."),
    ]
    assert "`history` is a number" in refusal(shape, row | {"history": 3}).detail
    assert "`input` is a list" in refusal(shape, row | {"input": ["a"]}).detail


def test_lists_in_which_nobody_asks_are_answers_to_the_prompt():
    row = {"prompt": "Hi.", "chosen": [GOOD], "rejected": [BAD, GOOD]}
    pair = only("repeated", row)
    assert pair == only("messages", row | {"prompt": [TURN]})
    assert only("repeated", row | {"history": [["Hm?", "?"]]}).prompt[:2] == (
        Message("user", "Hm?"),
        Message("assistant", "?"),
    )
    calls = [GOOD | {"tool_calls": [CALL]}, {"role": "tool", "content": "5"}, GOOD]
    assert len(only("repeated", row | {"chosen": calls}).chosen) == 3
    as_text = [GOOD | {"tool_calls": [json.dumps(CALL)]}, *calls[1:]]
    assert only("repeated", row | {"chosen": as_text}) == only("repeated", row | {"chosen": calls})
    for change in ({"chosen": [TURN, GOOD]}, {"chosen": [SYSTEM, GOOD]}, {"rejected": [BAD, TURN, BAD]}):
        assert refusal("repeated", row | change).reason == "prompt not repeated"


def test_a_pair_of_a_ranked_list_that_teaches_nothing_takes_no_other_with_it():
    row = {"prompt": "Hi.", "responses": ["good", " ", "good", "bad"], "scores": [4, 3, 2, 1]}
    pairs = read("ranked", row, ranked="all")
    found = [(pair.chosen[0].content, pair.rejected[0].content, pair.margin) for pair in pairs]
    assert found == [("good", "bad", 3.0), ("good", "bad", 1.0)]


@pytest.mark.parametrize(
    ("responses", "reason", "structural"),
    [
        (["a", "a", "a"], "identical responses", False),
        (["", "", "a"], "empty response", False),
        (["a", [TURN], "b"], "no answer", True),
        (["a", 5, "b"], "wrong type", True),
    ],
)
def test_a_ranked_list_without_a_pair_or_with_damage_is_refused_as_a_whole(responses, reason, structural):
    row = {"prompt": [TURN], "responses": responses, "scores": [3, 2, 1]}
    with pytest.raises(BadRow) as caught:
        read("ranked", row, ranked="all")
    assert (caught.value.reason, caught.value.structural) == (reason, structural)


RED = "\x1b[31m" + "\u202e" + "\n" + "r" * 500


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("text", {RED: 1, "prompt": "a"}),
        ("messages", {"prompt": [TURN | {"role": RED}], "chosen": [GOOD], "rejected": [BAD]}),
        ("messages", {"prompt": [TURN], "chosen": [GOOD | {"content": [{"type": RED}]}], "rejected": [BAD]}),
    ],
)
def test_what_data_says_controls_no_terminal_and_is_cut_short(shape, row):
    detail = refusal(shape, row).detail
    assert "`\\x1b[31m\\u202e\\nrrr" in detail
    assert detail.isprintable()
    assert "r" * 40 not in detail and "r…`" in detail


@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a_list_that_python_wrote_is_told_as_that(column):
    row = {"prompt": [TURN], "chosen": [GOOD], "rejected": [BAD]}
    as_json = {name: Cell(json.dumps(value)) for name, value in row.items()}
    assert only("messages", as_json) == only("messages", row)
    bad = refusal("messages", as_json | {column: Cell(row[column])})
    assert (bad.reason, bad.detail) == ("wrong type", f"`{column}` is a Python literal, not JSON")
    cut = refusal("messages", as_json | {column: Cell(as_json[column][:-3])})
    assert f"`{column}` is text that is not valid JSON" in cut.detail


@pytest.mark.parametrize("value", [["a", "b"], [None, 1], {"name": "f"}])
def test_any_value_that_python_wrote_is_told_as_that(value):
    bad = refusal("text", ROW_OF["text"] | {"tools": str(value)})
    assert bad.detail == "`tools` is a Python literal, not JSON"


def test_a_missing_field_lists_what_the_row_has():
    bad = refusal("instruction", {"prompt": "x", "instruction": "y"})
    assert "`chosen` is missing; the row has `prompt`, `instruction`" in bad.detail


@pytest.mark.parametrize("shape", FORMATS)
def test_a_row_that_could_not_be_read_is_refused_with_its_own_problem(shape):
    row = Row("a:1", None, "is cut off", reason="broken", structural=False)
    with pytest.raises(BadRow, match="is cut off") as caught:
        read_pairs(FORMATS[shape], row)
    assert (caught.value.reason, caught.value.structural) == ("broken", False)


SPEAKERS = {spelling: role for spelling, role in ROLES.items() if spelling not in CALLERS}


@pytest.mark.parametrize(("spelling", "role"), [*SPEAKERS.items(), ("GPT", "assistant"), (" Human ", "user")])
def test_a_speaker_may_have_any_of_its_usual_names(spelling, role):
    turns = [{"role": spelling, "content": "a"}, TURN]
    if role == "assistant":
        turns.insert(0, TURN)
    pair = only("messages", {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]})
    assert pair.prompt[-2] == Message(role, "a")


def conversation(*turns):
    """Write a conversation by its turns' initials and texts, as `u:Hi` does."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (["u:q", "a:1"], ["u:q", "a:2"], 1),
        (["u:q", "a:1", "u:r", "a:2"], ["u:q", "a:1", "u:r", "a:3"], 3),
        (["u:q", "a:1", "u:r", "a:2"], ["u:q", "a:0"], 1),
        # Turns of the assistant in a row are one answer, whether they differ, or one of them goes on.
        (["u:q", "a:1", "a:2"], ["u:q", "a:1", "a:3"], 1),
        (["u:q", "a:1", "a:2"], ["u:q", "a:1"], 1),
        (["u:q", "a:1", "a:2"], ["u:q", "a:1", "u:r", "a:3"], 1),
        (["u:q", "a:1", "t:x", "a:2", "a:3"], ["u:q", "a:1", "t:x", "a:2"], 3),
    ],
)
def test_responses_begin_where_an_answer_differs(chosen, rejected, shared):
    for one, other in ((chosen, rejected), (rejected, chosen)):
        pair = only("conversations", {"chosen": conversation(*one), "rejected": conversation(*other)})
        assert [m.content for m in pair.prompt] == [turn[2:] for turn in one[:shared]]
        assert [m.content for m in pair.chosen] == [turn[2:] for turn in one[shared:]]
        assert [m.content for m in pair.rejected] == [turn[2:] for turn in other[shared:]]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (["s:a", "u:q", "a:1"], ["s:b", "u:q", "a:2"]),
        (["s:a", "u:q", "a:1"], ["u:q", "a:2"]),
        (["u:q", "a:1", "u:r", "a:2"], ["u:q", "a:1", "u:s", "a:2"]),
        (["u:q", "a:1", "t:x", "a:2"], ["u:q", "a:1", "t:y", "a:2"]),
        # One goes on where the other stops: all that both answer is the same.
        (["u:q", "a:1", "u:r", "a:2"], ["u:q", "a:1"]),
        (["u:q", "a:1", "t:x", "a:2"], ["u:q", "a:1"]),
    ],
)
def test_conversations_that_part_elsewhere_are_no_preference_over_one_prompt(chosen, rejected):
    for one, other in ((chosen, rejected), (rejected, chosen)):
        bad = refusal("conversations", {"chosen": conversation(*one), "rejected": conversation(*other)})
        assert (bad.reason, bad.structural) == ("different contexts", False)


def test_an_answer_that_only_calls_a_tool_is_not_empty():
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    pair = only("messages", {"prompt": [TURN], "chosen": [calling], "rejected": [BAD]})
    assert pair.chosen == (Message("assistant", "", extras={"tool_calls": [CALL]}),)
    as_text = calling | {"tool_calls": json.dumps([CALL])}
    assert only("messages", {"prompt": [TURN], "chosen": [as_text], "rejected": [BAD]}).chosen == pair.chosen


def test_thoughts_are_read_by_any_of_their_names():
    for fields in (
        {"thinking": "Hm."},
        {"reasoning_content": "", "thinking": "Hm."},
        {"reasoning": "Hm.", "thinking": "Hm."},
    ):
        pair = only("messages", {"prompt": [TURN], "chosen": [GOOD | fields], "rejected": [BAD]})
        assert pair.chosen[0].extras == {"reasoning_content": "Hm."}
    bad = refusal(
        "messages", {"prompt": [TURN], "chosen": [GOOD | {"reasoning": "Hm.", "thinking": "Ah."}], "rejected": [BAD]}
    )
    assert (bad.reason, bad.structural) == ("two thoughts", True)
    assert "`reasoning` than in `thinking`" in bad.detail


def test_a_call_in_the_older_field_is_kept_and_no_empty_answer():
    calling = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    pair = only("messages", {"prompt": [TURN], "chosen": [calling], "rejected": [BAD]})
    assert pair.chosen == (Message("assistant", "", extras={"function_call": calling["function_call"]}),)
    as_text = calling | {"function_call": json.dumps(calling["function_call"])}
    assert only("messages", {"prompt": [TURN], "chosen": [as_text], "rejected": [BAD]}).chosen == pair.chosen
    bad = refusal("messages", {"prompt": [TURN], "chosen": [calling | {"function_call": "f()"}], "rejected": [BAD]})
    assert (bad.reason, bad.structural) == ("wrong type", True)
    assert "`chosen[0].function_call`" in bad.detail


@pytest.mark.parametrize("speaker", CALLERS)
@pytest.mark.parametrize("several", [False, True])
def test_a_turn_of_sharegpt_s_that_is_a_call_becomes_one(speaker, several):
    call = {"name": "f", "arguments": {"x": 1}}
    said = json.dumps([call, call] if several else call)
    row = ROW_OF["sharegpt"] | {"chosen": {"from": speaker, "value": said}}
    (turn,) = only("sharegpt", row).chosen
    made = {"type": "function", "function": call}
    assert turn == Message("assistant", "", extras={"tool_calls": [made, made] if several else [made]})
    for broken in ("f(1)", "[]", "{}", '[{"name": "f"}, 3]', '{"name": '):
        bad = refusal("sharegpt", ROW_OF["sharegpt"] | {"chosen": {"from": speaker, "value": broken}})
        assert (bad.reason, bad.structural) == ("wrong type", True)
        assert "`chosen`" in bad.detail


def test_the_nulls_with_which_parquet_fills_messages_leave_no_trace():
    turns = pa.array([[TURN, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": "x"}]])
    assert turns.to_pylist()[0][0] == TURN | {"tool_calls": None, "name": None}
    pair = only("messages", {"prompt": turns.to_pylist()[0][:1], "chosen": [GOOD], "rejected": [BAD]})
    assert pair.prompt == (Message("user", "Hi."),)


@pytest.mark.parametrize(
    ("scores", "ranks", "agree"),
    [
        ([1, 2, 3], [1, 2, 3], False),
        ([1, 2, 3], [3, 1, 2], False),
        ([1, 2, 3], [3, 2, 1], True),
        ([2, 2, 3], [3, 2, 1], True),
        ([1, 2, 3], [2, 2, 1], True),
        ([1, 2, 3], None, True),
    ],
)
def test_scores_and_ranks_that_call_different_answers_better_are_refused(scores, ranks, agree):
    row = {"prompt": "A river?", "responses": ["a", "b", "c"], "scores": scores, "ranks": ranks}
    if agree:
        assert only("ranked", row).chosen[0].text == "c"
    else:
        bad = refusal("ranked", row)
        assert (bad.reason, bad.structural) == ("scores against ranks", True)


@pytest.mark.parametrize("verdict", [{"label": 1}, {"winner": "a"}])
def test_a_verdict_against_the_scores_of_both_answers_is_refused(verdict):
    row = {"prompt": "A river?", "response_a": "Elbe", "response_b": "No", **verdict}
    for scores in ({"score_A": 5, "score_B": 2}, {"score_a": 2, "score_b": 2}, {"score_a": 1}, {"score_chosen": 1}):
        assert only("compared", row | scores).chosen[0].text == "Elbe"
    bad = refusal("compared", row | {"score_A": 2, "score_B": 5})
    assert (bad.reason, bad.structural) == ("scores against ranks", True)


@pytest.mark.parametrize("rule", ["extremes", "all"])
def test_the_margin_of_a_ranked_pair_is_the_difference_of_its_scores(rule):
    scores = [0.5, 2.0, -1.0]
    score_of = dict(zip(ROW_OF["ranked"]["responses"], scores, strict=True))
    pairs = read("ranked", ROW_OF["ranked"], ranked=rule)
    assert len(pairs) == {"extremes": 1, "all": 3}[rule]
    for pair in pairs:
        assert pair.margin == score_of[pair.chosen[0].text] - score_of[pair.rejected[0].text] > 0
    assert max(pair.margin for pair in pairs) == 3.0


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
    pair = only(shape, READABLE[shape] | given)
    if shape == "ranked" and given.get("margin") is None:
        margin = 3.0  # its scores'
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
        (1e39, "number out of range", "is not finite as a 32-bit number"),
        (10**400, "number out of range", "is not finite as a 32-bit number"),
    ],
)
def test_a_weight_or_margin_that_is_no_finite_number_is_refused(shape, name, value, reason, detail):
    bad = refusal(shape, READABLE[shape] | {name: value})
    assert (bad.reason, bad.structural) == (reason, True)
    assert f"`{name}` {detail}" in bad.detail


@pytest.mark.parametrize("shape", FORMATS)
def test_a_margin_may_be_negative_and_a_weight_may_not(shape):
    assert only(shape, READABLE[shape] | {"margin": -0.5}).margin == -0.5
    assert "`weight` is negative" in refusal(shape, READABLE[shape] | {"weight": -0.5}).detail


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize("name", ["source", "category"])
@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, ""),
        ("", ""),
        ("web", "web"),
        (7, "7"),
        (True, "true"),
        (["a", "é"], '["a", "é"]'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_a_row_of_every_shape_may_name_its_source_and_its_category(shape, name, value, label):
    assert getattr(only(shape, READABLE[shape] | {name: value}), name) == label


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"tools": None, "chat_template_kwargs": None}, {}),
        ({"tools": "", "chat_template_kwargs": ""}, {}),
        ({"tools": [], "chat_template_kwargs": {}}, {}),
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
        ({"tools": [json.dumps(TOOL), TOOL]}, {"tools": [TOOL, TOOL]}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"tools": [TOOL], "chat_template_kwargs": '{"date": "today"}'}, {"tools": [TOOL], "date": "today"}),
    ],
)
def test_a_row_of_every_shape_may_tell_the_template_more(shape, given, arguments):
    assert only(shape, READABLE[shape] | given).arguments == arguments


@pytest.mark.parametrize("shape", FORMATS)
@pytest.mark.parametrize(
    ("given", "reason", "detail"),
    [
        ({"tools": "a hammer"}, "wrong type", "`tools` is text instead of a list of objects"),
        ({"tools": [TOOL, "f"]}, "wrong type", "`tools[1]` is text instead of an object"),
        ({"tools": '[{"name": '}, "wrong type", "`tools` is text that is not valid JSON"),
        (
            {"tools": '[{"a": 1, "a": 2}]'},
            "wrong type",
            "not valid JSON: it has the key `a` twice",
        ),
        ({"tools": [{"name": "\ud83d"}]}, "undecodable text", "`tools` has half of a surrogate pair"),
        ({"tools": [{"name": b"f"}]}, "wrong type", "`tools` is not plain JSON"),
        ({"chat_template_kwargs": [1]}, "wrong type", "`chat_template_kwargs` is a list instead of an object"),
        ({"category": "\ud83d"}, "undecodable text", "`category` has half of a surrogate pair"),
    ],
)
def test_what_a_template_cannot_be_told_is_refused(shape, given, reason, detail):
    bad = refusal(shape, READABLE[shape] | given)
    assert (bad.reason, bad.structural) == (reason, True)
    assert detail in bad.detail
