"""Rows of every shape become the pairs and the tokens that were written down for them by hand."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from write_shapes_page import PAGE, page

from dpo_cli.data.pairs.detection import detect
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.records import Cell, Row
from tests.builders import prepare_pairs
from tests.conftest import write_rows
from tests.data.shapes import assistant, pair, system, user

CASES = {shape: importlib.import_module(f"tests.data.shapes.{shape}").CASES for shape in FORMATS}


def read_all(shape, rows, ranked="extremes", scratch=None):
    """Read rows as the lines of a source."""
    read = (Row(f"f:{line}", row) for line, row in enumerate(rows, 1))
    gathered = FORMATS[shape].gather(read, scratch) if FORMATS[shape].gather else read
    return [pair for row in gathered if row.values is not None for pair in read_pairs(FORMATS[shape], row, ranked)]


def nowhere(pairs):
    return [dataclasses.replace(one, origin="") for one in pairs]


@pytest.mark.parametrize(
    ("shape", "case"),
    [(shape, case) for shape in CASES for case in CASES[shape]],
    ids=lambda value: getattr(value, "about", value),
)
def test_rows_become_the_pairs_written_by_hand(tmp_path, shape, case):
    found = read_all(shape, case.rows, case.ranked, tmp_path)
    assert nowhere(found) == [expected.pair for expected in case.expected]


@pytest.mark.parametrize("shape", CASES)
def test_the_cases_shape_is_found(shape):
    rows = [Row("f:1", row) for case in CASES[shape] for row in case.rows]
    assert detect(rows, "f") == shape


SEGMENT = re.compile("⟦([^⟧]*)⟧")


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokens_and_gaps(tokenizer, marked):
    """Return the tokens of a marked text, and where those are that stand outside of its marks."""
    pieces = [ids(tokenizer, piece) for piece in SEGMENT.split(marked)]  # outside, inside, outside, …
    tokens = ids(tokenizer, marked.replace("⟦", "").replace("⟧", ""))
    assert list(itertools.chain.from_iterable(pieces)) == tokens, "a mark stands within a token: mark it elsewhere"
    ends = [0, *itertools.accumulate(map(len, pieces))]
    outside = [(start, stop) for start, stop in list(itertools.pairwise(ends))[::2] if start < stop]
    return tokens, list(itertools.chain.from_iterable(outside))


@pytest.fixture(scope="module", params=sorted({(shape, case.ranked) for shape in CASES for case in CASES[shape]}))
def prepared(request, tmp_path_factory, tokenizer):
    """All cases of a shape and a rule, prepared together, and what should be found."""
    shape, rule = request.param
    cases = [case for case in CASES[shape] if case.ranked == rule]
    folder = tmp_path_factory.mktemp("shapes")
    source = write_rows(folder / f"{shape}.jsonl", [row for case in cases for row in case.rows])
    pairs = prepare_pairs(source, tokenizer, folder / "prepared", data_format=shape, ranked=rule)
    return list(pairs), [expected for case in cases for expected in case.expected]


def test_rows_become_the_tokens_written_by_hand(prepared, tokenizer):
    pairs, expected = prepared
    assert len(pairs) == len(expected)
    for found, written in zip(pairs, expected, strict=True):
        assert found.prompt.tolist() == ids(tokenizer, written.prompt)
        for tokens, gaps, text in (
            (found.chosen, found.chosen_gaps, written.chosen),
            (found.rejected, found.rejected_gaps, written.rejected),
        ):
            listed = [] if gaps is None else gaps.tolist()
            assert (tokens.tolist(), listed) == tokens_and_gaps(tokenizer, text)


def test_what_a_row_says_beside_its_texts_is_kept_with_the_tokens(prepared):
    pairs, expected = prepared
    for found, written in zip(pairs, expected, strict=True):
        for name in ("weight", "margin", "source", "category"):
            assert getattr(found, name) == getattr(written.pair, name)


def said(role, content):
    return {"role": role, "content": content}


def in_every_shape(prompt, chosen, rejected):
    """Spell one pair of a single turn in every shape."""
    asked, better, worse = said("user", prompt), said("assistant", chosen), said("assistant", rejected)
    return {
        "instruction": [{"instruction": prompt, "chosen": chosen, "rejected": rejected}],
        "text": [{"prompt": prompt, "chosen": chosen, "rejected": rejected}],
        "messages": [{"prompt": [asked], "chosen": [better], "rejected": [worse]}],
        "repeated": [{"prompt": prompt, "chosen": [asked, better], "rejected": [asked, worse]}],
        "conversations": [{"chosen": [asked, better], "rejected": [asked, worse]}],
        "hh": [{n: f"\n\nHuman: {prompt}\n\nAssistant: {t}" for n, t in (("chosen", chosen), ("rejected", rejected))}],
        "sharegpt": [
            {
                "conversations": [{"from": "human", "value": prompt}],
                "chosen": {"from": "gpt", "value": chosen},
                "rejected": {"from": "gpt", "value": rejected},
            }
        ],
        "ranked": [{"prompt": prompt, "responses": [rejected, chosen], "scores": [1, 2]}],
        "unpaired": [
            {"prompt": prompt, "completion": chosen, "label": True},
            {"prompt": prompt, "completion": rejected, "label": False},
        ],
        "compared": [{"prompt": prompt, "response_1": rejected, "response_2": chosen, "winner": 2}],
    }


def test_every_shape_can_express_a_single_turn():
    assert set(in_every_shape("a", "b", "c")) == set(FORMATS)


# What the HH text cannot say is left out: space around a turn, and its own names of turns.
words = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(lambda text: text and "Human:" not in text and "Assistant:" not in text)
)


@settings(deadline=None)  # a busy machine
@given(words, words, words)
def test_one_pair_in_every_shape_is_the_same_pair(tmp_path_factory, prompt, chosen, rejected):
    if chosen == rejected:
        return
    expected = pair([user(prompt)], [assistant(chosen)], [assistant(rejected)])
    for shape, rows in in_every_shape(prompt, chosen, rejected).items():
        scratch = tmp_path_factory.mktemp("scratch") if FORMATS[shape].gather else None
        (found,) = read_all(shape, rows, scratch=scratch)
        # Only a ranked list says by how much the better answer is better.
        assert dataclasses.replace(found, origin="", margin=0.0) == expected


def test_a_conversation_of_several_turns_in_every_shape_that_can_express_it_is_the_same_pair(tmp_path):
    turns = [said("user", "A riddle?"), said("assistant", "What has keys but no locks?"), said("user", "A piano!")]
    better, worse = said("assistant", "Right."), said("assistant", "Wrong, a map.")
    opened = [said("system", "Play along."), *turns]
    spelled = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]
    shapes = {
        "instruction": [
            {
                "system": "Play along.",
                "history": [["A riddle?", "What has keys but no locks?"]],
                "instruction": "A piano!",
                "chosen": "Right.",
                "rejected": "Wrong, a map.",
            }
        ],
        "messages": [{"prompt": opened, "chosen": [better], "rejected": [worse]}],
        "repeated": [{"prompt": "A riddle?", "chosen": [*opened, better], "rejected": [*opened, worse]}],
        "conversations": [{"chosen": [*opened, better], "rejected": [*opened, worse]}],
        "sharegpt": [{"system": "Play along.", "conversations": spelled, "chosen": better, "rejected": worse}],
        "ranked": [{"prompt": opened, "responses": [[better], [worse]], "ranks": [1, 2], "margin": 0}],
        "unpaired": [
            {"prompt": opened, "completion": [better], "label": 1},
            {"prompt": opened, "completion": [worse], "label": 0},
        ],
        "compared": [{"conversation": opened, "response_a": better, "response_b": worse, "label": True}],
    }
    expected = pair(
        [system("Play along."), user("A riddle?"), assistant("What has keys but no locks?"), user("A piano!")],
        [assistant("Right.")],
        [assistant("Wrong, a map.")],
    )
    for shape, rows in shapes.items():
        assert nowhere(read_all(shape, rows, scratch=tmp_path)) == [expected], shape


def csv_cell(value):
    """Write a value as a cell: what is not text as JSON."""
    return Cell(value if isinstance(value, str) else "" if value is None else json.dumps(value))


@pytest.mark.parametrize("shape", CASES)
def test_lists_and_objects_may_be_json_in_the_cells_of_a_csv_file(tmp_path, shape):
    for case in CASES[shape]:
        numbers = ("weight", "margin")  # read as numbers from CSV
        rows = [{n: v if n in numbers else csv_cell(v) for n, v in row.items()} for row in case.rows]
        found = read_all(shape, rows, case.ranked, tmp_path)
        assert nowhere(found) == [expected.pair for expected in case.expected]


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make generated`"


@pytest.mark.parametrize("shape", [name for name, shape in FORMATS.items() if not shape.gather])
def test_the_example_on_the_page_is_a_pair(shape):
    (found,) = read_pairs(FORMATS[shape], Row("f:1", FORMATS[shape].example))
    assert found.prompt
