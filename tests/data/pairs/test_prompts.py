"""Prompts by themselves: every form of them, and what is none, by file and line."""

from __future__ import annotations

import json

import pytest

from dpo_cli.data.pairs.prompts import check_prompts, read_prompts
from dpo_cli.data.records import Message
from dpo_cli.errors import UserError
from tests.conftest import write_rows

USER = Message("user", "Add 1 and 2.")
SYSTEM = Message("system", "Be brief.")


def errors_of(call) -> list[UserError]:
    try:
        call()
    except UserError as error:
        return [error]
    except ExceptionGroup as group:
        return list(group.exceptions)
    return []


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Add 1 and 2."}, (USER,)),
        ({"instruction": "Add.", "input": "1 2"}, (Message("user", "Add.", "1 2"),)),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add 1 and 2."}]},
         (SYSTEM, USER)),
        ({"prompt": [{"from": "human", "value": "Add 1 and 2."}]}, (USER,)),
        ({"prompt": "Add 1 and 2.", "system": "Be brief.", "chosen": "3", "rejected": "4"}, (SYSTEM, USER)),
        ({"prompt": "Add 1 and 2.", "history": [["Hi", "Hello"]]},
         (Message("user", "Hi"), Message("assistant", "Hello"), USER)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_rows_of_every_form_are_prompts(tmp_path, row, messages, kind):
    file = tmp_path / f"prompts.{kind}"
    file.write_text(json.dumps([row] if kind == "json" else row), encoding="utf-8")
    (prompt,) = read_prompts(str(file))
    assert prompt.messages == messages
    assert prompt.origin == f"{file}:1"


def test_lines_of_a_text_are_prompts_whatever_they_look_like(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('\ufeffName a prime.\n\n  [1, 2] is what?  \r\n{"prompt": 1}\n分析', encoding="utf-8")
    found = read_prompts(str(file))
    assert [prompt.messages[0].content for prompt in found] == [
        "Name a prime.", "[1, 2] is what?", '{"prompt": 1}', "分析",
    ]  # fmt: skip
    assert [prompt.origin for prompt in found] == [f"{file}:{line}" for line in (1, 3, 4, 5)]
    assert read_prompts(str(file), 2) == found[:2]


def test_tools_and_other_arguments_of_the_template_and_the_system_of_the_configuration_are_kept(tmp_path):
    row = {"prompt": "Add 1 and 2.", "tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": False}}
    (prompt,) = read_prompts(str(write_rows(tmp_path / "p.jsonl", [row])), system="Be brief.")
    assert prompt.arguments == {"tools": [{"name": "add"}], "enable_thinking": False}
    assert prompt.messages == (SYSTEM, USER)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "Why?"}', "the row has no prompt; it has `question`"),
        ('{"prompt": ""}', "`prompt` is empty"),
        ('{"prompt": 3}', "`prompt` is a number instead of a list of messages"),
        ('{"prompt": "a", "system": 3}', "`system` is a number instead of text"),
        ('{"messages": []}', "`messages` is an empty list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "`messages[0].role` is `robot`"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "ends with the"),
        ('{"prompt": ', "not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named_by_file_and_line(tmp_path, text, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{text}\n{text}\n', encoding="utf-8")
    found = errors_of(lambda: read_prompts(str(file)))
    assert [error.where for error in found] == [f"{file}:2", f"{file}:3"]
    assert all(said in error.what and "`instruction`" in error.hint for error in found)


def test_of_many_bad_rows_the_first_are_named_and_the_others_counted(tmp_path):
    found = errors_of(lambda: read_prompts(str(write_rows(tmp_path / "p.jsonl", [{"x": 1}] * 30))))
    assert [error.where for error in found] == [
        *(f"{tmp_path / 'p.jsonl'}:{n}" for n in range(1, 9)),
        str(tmp_path / "p.jsonl"),
    ]
    assert "22 more rows" in found[-1].what


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl"])
def test_a_file_without_prompts_is_refused(tmp_path, name):
    (tmp_path / name).write_text("\n \n" if name == "blank.txt" else "")
    (error,) = errors_of(lambda: read_prompts(str(tmp_path / name)))
    assert error.what == "there are no prompts"


def test_bytes_that_are_not_utf_8_are_named_by_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"fine\nna\xefve\n")
    (error,) = errors_of(lambda: read_prompts(str(tmp_path / "p.txt")))
    assert error.where == f"{tmp_path / 'p.txt'}:2"
    assert "0xef" in error.what


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "some/none.parquet"])
def test_a_file_that_is_not_there_is_refused_before_anything_is_read(tmp_path, name):
    problem = check_prompts(str(tmp_path / name), "--prompts")
    assert problem is not None
    assert problem.where == "--prompts"
    (tmp_path / "there.txt").touch()
    assert check_prompts(str(tmp_path / "there.txt"), "--prompts") is None
