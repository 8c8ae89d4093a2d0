"""Answers side by side: on a terminal of any width, on a pipe, without colours, and as a page."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dpo_cli.reporting.answers import AnswersBeside, bare_prompts
from dpo_cli.reporting.pages.answers import answers_page
from tests.reporting.test_data_page import HOSTILE, Page


def row(model, answer, **changed):
    values = {"where": "f:1", "prompt": "Name the capital.", "model": model, "answer": answer, "tokens": 3}
    return {**values, "ended": True, "chosen": "Paris.", "chosen_tokens": 2, **changed}


OLD, NEW = row("old", "Well, Paris is the capital.", ended=False), row("new", "Paris is the capital.", tokens=1)


def shown(rows, width=100, *, colour=False) -> str:
    settings = {"force_terminal": True, "color_system": "standard"} if colour else {"no_color": True}
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, **settings)
    console.print(AnswersBeside(7, rows, colour=colour))
    return console.file.getvalue()


def test_without_colours_differences_are_between_marks():
    lines = shown([OLD, NEW], 10_000).splitlines()
    assert lines == [
        "7. f:1",
        "  Name the capital.",
        "  old  3 tokens, cut off",
        "    [-Well,-] Paris is the capital.",
        "  new  1 token",
        "    Paris is the capital.",
    ]
    assert "{+Well,+} Paris" in shown([NEW, OLD])


def test_with_colours_there_are_no_marks():
    said = shown([OLD, NEW], colour=True)
    assert "\x1b[31mWell,\x1b[0m" in said
    assert "[-" not in said


@pytest.mark.parametrize("width", [40, 80, 100, 200])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_columns_where_there_is_room_and_never_wider_than_the_terminal(width, count):
    text = "The quick brown fox jumps. " * 8 + "分析社交媒体平台" * 9
    lines = shown([row(f"model-{n}", text) for n in range(count)], width).splitlines()
    assert max(map(cell_len, lines)) <= width
    beside = any("model-0" in line and "model-1" in line for line in lines)
    assert beside == (count > 1 and width // count >= 34)


def test_an_answer_that_is_the_same_or_empty_is_named_so():
    said = shown([OLD, {**OLD, "model": "other"}, row("mute", " ")])
    assert said.count("the same") == 1
    assert "(nothing)" in said


def test_lines_of_an_answer_stay_lines():
    lines = shown([row("one", "a\nb"), row("two", "a\n\nb")], 40).splitlines()
    assert [line.strip() for line in lines if line.startswith("    ")] == ["a", "b", "a", "", "b"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_on_the_page(text):
    def page(said):
        rows = [row(said, said, where=said, prompt=said, chosen=said), row("b", f"{said} more words than that")]
        return answers_page([rows], 5)

    hostile, plain = Page(page(text)), Page(page("plain"))
    assert set(hostile.tags) <= set(plain.tags)
    assert not {"script", "img", "svg"} & set(hostile.tags)
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert all(character.isprintable() or character == "\n" for character in page(text))


def test_the_page_shows_who_answered_what_how_long_and_what_differs():
    written = answers_page([[OLD, NEW], [row("old", "same\nlines"), row("new", "same\nlines")]], 64)
    page = Page(written)
    for part in (
        "2 prompts",
        "at most 64 tokens",
        "f:1",
        "Name the capital.",
        "3 tokens, cut off",
        "1 token",
        "Paris.",
    ):
        assert part in page.text, part
    assert "<mark>Well,</mark>" in written
    assert page.tags.count("mark") == 1
    assert "same<br>lines" in written
    cells = [cell for cell in page.text.split("\n") if cell.startswith(("old", "new"))]
    assert cells[:2] == ["old3.01", "new2.021"]


def test_of_several_models_each_is_compared_with_the_first():
    written = answers_page([[row("a", "one two three"), row("b", "one two four"), row("c", "zero two three")]], 64)
    assert written.count("<mark>") == 2
    assert "<mark> four</mark>" in written and "<mark>zero</mark>" in written


CHATML, PLAIN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "### Instruction:\n{}\n\n### Response:\n"


@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize("asked", [["What is 1?", "What is 2?"], ["Why?", "Why not?", "a\nb?"], ["One.", "One."]])
def test_of_prompts_what_the_template_writes_around_all_of_them_is_left_out(template, asked):
    """One prompt, or the same twice, tells nothing of the template and is shown whole, marked as what it is."""
    texts = [template.format(text) for text in asked]
    whole = [f"(with what the template writes) {text}" for text in texts]
    assert bare_prompts(texts) == ([f"…{text}" for text in asked] if len(set(asked)) > 1 else whole)
    assert bare_prompts(texts[:1]) == whole[:1]
    assert bare_prompts(asked[:1]) == asked[:1]
