"""Columns under other names give the pairs that they give under their own; a mapping that cannot be is explained."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config import load_config
from dpo_cli.data.pairs.detection import detect
from dpo_cli.data.pairs.renaming import KNOWN, proposed_columns, renamed, shown_columns, under_other_names
from dpo_cli.data.pairs.shapes import FORMATS
from dpo_cli.data.pairs.sources import Source, describe
from dpo_cli.data.prepared import folder as prepared
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.records import Row
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.errors import UserError
from tests.conftest import ROW_OF, make_config, write_rows

SYSTEM = "Answer in one word."
TURN, SAID = {"role": "user", "content": "A river?"}, {"role": "assistant", "content": "Elbe"}


def prepared_rows(rows, tokenizer, folder, source=None, **reading) -> PreparedPairs:
    folder.mkdir()
    path = write_rows(folder / "rows.jsonl", rows)
    tokenize = PairTokenizer(tokenizer, template=None, max_length=1000, on_too_long="drop")
    return prepare([Source(path=str(path), **(source or {}))], Reading(**reading), tokenize, folder / "prepared")


def rows_of(shape):
    """Return rows of a shape that make a pair."""
    row = ROW_OF[shape]
    return [row, {**row, "completion": "4", "label": False}] if shape == "unpaired" else [row]


def prompt_of(pairs, tokenizer):
    return tokenizer.decode(pairs[0].prompt)


names = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=6, max_size=6, unique=True)


@pytest.mark.parametrize("shape", FORMATS)
@given(data=st.data())
def test_a_row_is_itself_again_whatever_its_columns_were_called(shape, data):
    row = ROW_OF[shape]
    columns = dict(zip(row, data.draw(names), strict=False))
    called_otherwise = {columns[name]: value for name, value in row.items()} | {"another column": 1}
    (back,) = renamed([Row("f:1", called_otherwise)], columns, "")
    assert back.values == row | {"another column": 1}
    assert detect([back], "f") == shape


@pytest.mark.parametrize("shape", FORMATS)
def test_renamed_columns_become_the_same_tokens(tmp_path, tokenizer, shape):
    rows = rows_of(shape)
    columns = {name: f"the {name}" for name in ROW_OF[shape]}
    called_otherwise = [{columns[name]: value for name, value in row.items()} for row in rows]
    plain = prepared_rows(rows, tokenizer, tmp_path / "plain")
    mapped = prepared_rows(called_otherwise, tokenizer, tmp_path / "mapped", columns=columns)
    of_source = prepared_rows(
        called_otherwise, tokenizer, tmp_path / "source", {"columns": columns}, columns={"prompt": "other"}
    )
    assert plain.manifest["tokens"] == mapped.manifest["tokens"] == of_source.manifest["tokens"]
    assert len(plain) == 1


def test_columns_may_change_places():
    row = {"prompt": "p", "chosen": "worse", "rejected": "better"}
    swapped = under_other_names(row, {"chosen": "rejected", "rejected": "chosen"})
    assert swapped == {"prompt": "p", "chosen": "better", "rejected": "worse"}


def test_a_row_that_has_the_new_name_alone_keeps_it():
    rows = [Row("f:1", {"question": "a", "prompt": None}), Row("f:2", {"prompt": "b"})]
    assert [row.values for row in renamed(rows, {"prompt": "question"}, "")] == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_late_row_with_both_names_is_a_broken_row():
    (row,) = renamed([Row("f:1001", {"question": "a", "prompt": "b"})], {"prompt": "question"}, "")
    assert row.values is None
    assert row.problem == "`prompt` is there twice: the row has it, and `question`"


@pytest.mark.parametrize(
    ("columns", "what", "hint"),
    [
        ({"prompt": "qestion"}, "no row has a column `qestion`", "did you mean `question`?"),
        ({"prompt": "zzz"}, "no row has a column `zzz`", r"the rows have `system`, `question`, .*`columns: \{\}`"),
        ({"chosen": "question"}, "the rows also have a column `chosen`", "leave `chosen` out"),
    ],
)
def test_a_mapping_that_is_not_of_these_rows_is_explained(tmp_path, tokenizer, columns, what, hint):
    row = {"system": "s", "question": "q", "chosen": "c", "rejected": "r"}
    with pytest.raises(UserError, match=what) as caught:
        prepared_rows([row], tokenizer, tmp_path / "rows", columns=columns)
    assert caught.value.where == str(tmp_path / "rows" / "rows.jsonl")
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize("place", ["data.columns", "data.train.columns"])
@pytest.mark.parametrize(
    ("columns", "what", "hint"),
    [
        ("{promt: question}", "`promt` in `columns` is not a column that a shape reads", "did you mean `prompt`?"),
        ("{question: prompt}", "`question` in `columns` is not a column", "`prompt: question`"),
        (
            "{prompt: a, chosen: a}",
            "`prompt` and `chosen` in `columns` are both read from the column `a`",
            "another column",
        ),
        ("{xyzzy: a}", "`xyzzy` in `columns` is not a column", "known here: `instruction`"),
    ],
)
def test_a_mapping_that_cannot_be_is_a_wrong_setting(tmp_path, pairs_file, place, columns, what, hint):
    config = make_config(tmp_path, tmp_path, pairs_file, data={"train": {"path": str(pairs_file)}})
    with pytest.raises(UserError) as caught:
        load_config(config, [f"{place}={columns}"])
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_single_columns_are_set_by_their_dotted_path(tmp_path, pairs_file):
    config = make_config(tmp_path, tmp_path, pairs_file)
    overrides = ["data.columns.prompt=question", "data.columns.chosen=a"]
    assert load_config(config, overrides).data.columns == {"prompt": "question", "chosen": "a"}


# The system's turn


@pytest.mark.parametrize("shape", FORMATS)
def test_the_system_speaks_where_a_row_has_nothing_of_it(tmp_path, tokenizer, shape):
    rows = rows_of(shape)
    has_its_own = shape == "messages"
    pairs = prepared_rows(rows, tokenizer, tmp_path / "rows", system=SYSTEM)
    own = prepared_rows([{**row, "system": SYSTEM} for row in rows_of("text")], tokenizer, tmp_path / "own")
    opening = tokenizer.apply_chat_template([{"role": "system", "content": SYSTEM}], tokenize=False)
    assert prompt_of(pairs, tokenizer).startswith(opening) != has_its_own
    assert prompt_of(own, tokenizer).startswith(opening)
    assert prompt_of(pairs, tokenizer).count("system") == 1


def test_the_system_of_a_row_wins(tmp_path, tokenizer):
    rows = [{**ROW_OF["text"], "system": "Be kind."}, {**ROW_OF["text"], "system": " "}, ROW_OF["messages"]]
    for number, (row, said) in enumerate(zip(rows, ("Be kind.", SYSTEM, "Be brief."), strict=True)):
        prompt = prompt_of(prepared_rows([row], tokenizer, tmp_path / str(number), system=SYSTEM), tokenizer)
        assert said in prompt
        assert prompt.count("<|im_start|>system") == 1


@pytest.mark.parametrize(("own", "said"), [(None, SYSTEM), ("Be kind.", "Be kind."), ("", None)])
def test_a_source_may_have_a_system_of_its_own(tmp_path, tokenizer, own, said):
    pairs = prepared_rows([ROW_OF["text"]], tokenizer, tmp_path / "rows", {"system": own}, system=SYSTEM)
    prompt = prompt_of(pairs, tokenizer)
    assert (f"<|im_start|>system\n{said}" in prompt) if said else "system" not in prompt


def test_answers_are_paired_by_what_the_model_is_given(tmp_path, tokenizer):
    """One row says itself what `data.system` says for the other: the prompts are the same."""
    good, bad = rows_of("unpaired")
    pairs = prepared_rows([{**good, "system": SYSTEM}, bad], tokenizer, tmp_path / "rows", system=SYSTEM)
    assert len(pairs) == 1


def test_what_a_source_says_of_its_columns_is_named_and_part_of_its_fingerprint(tmp_path, tokenizer):
    path = str(write_rows(tmp_path / "a.jsonl", [ROW_OF["text"]]))
    tokenize = PairTokenizer(tokenizer, template=None, max_length=1000, on_too_long="drop")
    said = [{}, {"columns": {"prompt": "a b"}}, {"columns": {"prompt": "b"}}, {"columns": {}}, {"system": "x"}]
    digests = {prepared.fingerprint([Source(path=path, **one)], Reading(), tokenize) for one in said}
    assert len(digests) == len(said)
    assert describe([Source(path=path, **said[1])]) == f"{path} (columns {{prompt: a b}})"


# Guesses


@pytest.mark.parametrize(
    ("columns", "guess"),
    [
        (
            "qid question response_j response_k",
            {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        ),
        ("system question chosen rejected", {"prompt": "question"}),
        (
            "instruction chosen_response rejected_response",
            {"chosen": "chosen_response", "rejected": "rejected_response"},
        ),
        ("prompt accepted rejected", {"chosen": "accepted"}),
        ("Query Positive Negative", {"prompt": "Query", "chosen": "Positive", "rejected": "Negative"}),
        ("input good bad", {"prompt": "input", "chosen": "good", "rejected": "bad"}),
        ("prompt preferred dispreferred", {"chosen": "preferred", "rejected": "dispreferred"}),
        ("userPrompt answerGood answerBad", {"prompt": "userPrompt", "chosen": "answerGood", "rejected": "answerBad"}),
        ("question answer label", {"prompt": "question", "completion": "answer"}),
        (
            "input preferred_output non_preferred_output",
            {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        ),
        ("question candidates ratings", {"prompt": "question", "responses": "candidates", "scores": "ratings"}),
        ("prompt rejected chosen rejected_model chosen_model", None),
        (
            "question_id model_a model_b winner conversation_a conversation_b turn",
            {"response_a": "conversation_a", "response_b": "conversation_b"},
        ),
        (
            "post_id history human_ref_A human_ref_B labels score_A score_B",
            {"prompt": "history", "response_a": "human_ref_A", "response_b": "human_ref_B", "label": "labels"},
        ),
        (
            "question answer_1 answer_2 preference",
            {"prompt": "question", "response_1": "answer_1", "response_2": "answer_2", "winner": "preference"},
        ),
        ("prompt response_0 response_1 better_response_id", {"winner": "better_response_id"}),
        ("instruction output1 output2 better", {"response_1": "output1", "response_2": "output2", "winner": "better"}),
    ],
)
def test_names_tell_what_columns_hold(columns, guess):
    assert proposed_columns(columns.split()) == guess


@pytest.mark.parametrize(
    "columns",
    [
        "question response_a response_b",
        "question answer_1 answer_2",
        "text",
        "j k",
        "",
    ],
)
def test_nothing_is_guessed_where_names_do_not_tell_which_answer_is_better(columns):
    assert proposed_columns(columns.split()) is None


@pytest.mark.parametrize("shape", FORMATS)
def test_no_other_names_are_proposed_to_rows_that_have_their_own(shape):
    assert proposed_columns(ROW_OF[shape]) is None


@pytest.mark.parametrize(
    "row",
    [
        {"question": "A river?", "response_j": "Elbe", "response_k": "No"},
        {"the question": "A river?", "query": "A river?", "Good Answer": "Elbe", "Bad Answer": "No"},
        {"question": "A river?", "answer": "Elbe", "label": 1},
        {"good": ROW_OF["conversations"]["chosen"], "bad": ROW_OF["conversations"]["rejected"]},
        {"query": "A river?", "candidates": ["a", "b"], "ranking": [1, 2]},
        {"input": {"messages": [TURN]}, "preferred_output": [SAID], "non_preferred_output": [SAID]},
        {"winner": "tie", "model_a": "x", "model_b": "y", "conversation_a": [TURN, SAID], "conversation_b": [TURN]},
        {"history": "A river?", "human_ref_A": "Elbe", "human_ref_B": "No", "labels": 0},
        {"question": "A river?", "answer_1": "Elbe", "answer_2": "No", "preference": 1},
        {"question": [TURN], "answer_a": SAID, "answer_b": SAID, "better": "b"},
    ],
)
def test_what_the_error_proposes_can_be_pasted(tmp_path, row):
    with pytest.raises(UserError) as caught:
        detect([Row("f:1", row)], "f")
    setting = caught.value.hint.split("`")[1]
    columns = load_config(make_config(tmp_path, tmp_path, tmp_path), [setting.replace(": ", "=", 1)]).data.columns
    assert detect([*renamed([Row("f:1", row)], columns, "")], "f") in FORMATS


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"chosen": "a", "rejected": "b", "said": "c"},
            "nearest shape is `text`, which also needs `prompt`: .*`data.columns: {prompt: …}`",
        ),
        (
            {"instruction": "a", "chosen": "b", "output": "c"},
            "nearest shape is `instruction`, which also needs `rejected`",
        ),
        (
            dict.fromkeys("abc", 1),
            "`text`, which also needs `prompt`, `chosen`, `rejected`: .*{prompt: …, chosen: …, rejected: …}",
        ),
        ({"prompt": "a", "responses": ["b"]}, "nearest shape is `ranked`, which also needs `scores`"),
        ({"chosen": "a", "rejected": "b"}, "needs `prompt`, for which the rows have no columns left"),
        ({"prompt": "a", "completion": "b"}, "needs `label`, for which the rows have no columns left"),
        (
            {"data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
            "`rejected`, for which the rows have no columns left",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "`rejected`, for which the rows have no columns left"),
    ],
)
def test_what_cannot_be_guessed_is_told_by_the_one_thing_that_differs(row, hint):
    with pytest.raises(UserError) as caught:
        detect([Row("f:1", row)], "f")
    assert re.search(hint, caught.value.hint), caught.value.hint
    assert len(caught.value.hint) < 200


@given(st.dictionaries(st.sampled_from(KNOWN), st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
def test_a_mapping_is_written_as_yaml_reads_it(columns):
    assert yaml.safe_load(shown_columns(columns)) == columns
