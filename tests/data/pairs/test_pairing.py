"""Answers that were judged one by one find their counterparts, wherever in a source they stand."""

from __future__ import annotations

import json
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.pairs.pairing import gather
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import Message, Row


def rows_of(judged):
    """Write rows of (prompt, label), each with an answer that no other has."""
    for line, (prompt, label) in enumerate(judged, 1):
        yield Row(f"f:{line}", {"prompt": prompt, "completion": f"answer {line}", "label": label})


def texts(row):
    """Return the chosen and the rejected answer."""
    (pair,) = read_pairs(FORMATS["unpaired"], row)
    return pair.chosen[0].text, pair.rejected[0].text


def lines(row):
    return [int(origin.removeprefix("f:")) for origin in row.origin.split("+")]


@settings(deadline=None)  # a busy machine
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30))
def test_the_kth_good_answer_of_a_prompt_meets_the_kth_bad_one(tmp_path_factory, judged):
    found = list(gather(rows_of(judged), tmp_path_factory.mktemp("scratch")))
    expected, alone = set(), set()
    for prompt in "abcd":
        good, bad = ([line for line, one in enumerate(judged, 1) if one == (prompt, label)] for label in (True, False))
        both = min(len(good), len(bad))
        expected |= set(zip(good, bad, strict=False))
        alone |= {*good[both:], *bad[both:]}
    assert {tuple(lines(row)) for row in found if row.values is not None} == expected
    assert {lines(row)[0] for row in found if row.values is None} == alone
    assert sum(row.num_rows for row in found) == len(judged)
    for row in found:
        if row.values is None:
            assert (row.reason, row.structural) == ("no counterpart", False)
        else:
            good_line, bad_line = lines(row)
            assert texts(row) == (f"answer {good_line}", f"answer {bad_line}")


@settings(deadline=None)  # a busy machine
@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=20))
def test_what_comes_first_in_the_source_comes_first(tmp_path_factory, judged):
    found = [min(lines(row)) for row in gather(rows_of(judged), tmp_path_factory.mktemp("scratch"))]
    assert found == sorted(found)


def test_bad_rows_travel_on_with_their_problems_and_break_no_pair(tmp_path):
    unreadable = Row("f:1", None, "the row is not valid JSON")
    rows = [Row(f"f:{line}", {"prompt": "a", "completion": c, "label": label})
            for line, (c, label) in enumerate([("x", True), (" ", False), ("y", "?"), ("z", False)], 2)]  # fmt: skip
    first, pair, empty, odd = gather(iter([unreadable, *rows]), tmp_path)
    assert first == unreadable
    assert (pair.origin, *texts(pair)) == ("f:2+f:5", "x", "z")
    assert (empty.origin, empty.reason, empty.structural) == ("f:3", "empty response", False)
    assert (odd.origin, odd.reason, odd.structural) == ("f:4", "wrong label", True)


def test_the_template_s_arguments_are_a_part_of_the_prompt(tmp_path):
    rows = [
        {"prompt": "a", "completion": "x", "label": 1, "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "y", "label": 0},
        {"prompt": "a", "completion": "z", "label": 0, "tools": json.dumps([{"name": "f"}])},
    ]
    found = list(gather((Row(f"f:{line}", row) for line, row in enumerate(rows, 1)), tmp_path))
    assert [row.origin for row in found if row.values] == ["f:1+f:3"]


def test_what_was_said_before_is_a_part_of_the_prompt_and_stays_in_the_pair(tmp_path):
    before = {"history": [["u", "v"]], "input": "w", "system": "s"}
    rows = [
        {"prompt": "a", "completion": "x", "label": 1} | before,
        *({"prompt": "a", "completion": "y", "label": 0} | before | {name: None} for name in before),
        {"prompt": "a", "completion": "z", "label": 0} | before,
    ]
    found = list(gather((Row(f"f:{line}", row) for line, row in enumerate(rows, 1)), tmp_path))
    (row,) = (row for row in found if row.values)
    (pair,) = read_pairs(FORMATS["unpaired"], row)
    assert pair.origin == "f:1+f:5"
    assert pair.prompt == (
        Message("system", "s"), Message("user", "u"), Message("assistant", "v"), Message("user", "a", input="w"),
    )  # fmt: skip


def test_two_system_prompts_are_no_prompt(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    (bad,) = gather(iter([Row("f:1", {"prompt": turns, "completion": "x", "label": 1, "system": "t"})]), tmp_path)
    assert (bad.reason, bad.structural) == ("two system prompts", True)


def test_a_label_controls_no_terminal(tmp_path):
    (bad,) = gather(iter([Row("f:1", {"prompt": "a", "completion": "x", "label": "\x1b[31m"})]), tmp_path)
    assert "`\\x1b[31m`" in bad.problem


def test_the_texts_of_the_rows_are_not_in_memory(tmp_path):
    num_rows, text = 4_000, "word " * 1000
    judged = ((f"{number // 2} {text}", bool(number % 2)) for number in range(num_rows))
    tracemalloc.start()
    try:
        num_pairs = sum(1 for _ in gather(rows_of(judged), tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_pairs == num_rows // 2
    assert peak < num_rows * len(text) / 10


def test_what_waits_in_the_file_comes_back_as_it_was_parsed(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": [None, 1.5]}}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "é\u2028"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "yes"},
    ]
    rows = [
        {"prompt": "a", "input": "b", "completion": turns, "label": 1, "margin": 0.1, "weight": 3, "category": ["x"]},
        {"prompt": "a\nb", "completion": "z", "label": 0, "weight": 2},
    ]
    (row,) = gather((Row(f"f:{line}", row) for line, row in enumerate(rows, 1)), tmp_path)
    (pair,) = read_pairs(FORMATS["unpaired"], row)
    columns = {name: rows[0][name] for name in ("input", "margin", "category")}
    messages = {**columns, "instruction": "a", "chosen": turns, "rejected": "z", "weight": 2.5}
    (expected,) = read_pairs(FORMATS["instruction"], Row("f:1+f:2", messages))
    assert pair == expected
    assert json.dumps(pair.chosen[0].extras) == json.dumps(expected.chosen[0].extras)
    assert [message.scored for message in pair.chosen] == [True, True, False, True]
