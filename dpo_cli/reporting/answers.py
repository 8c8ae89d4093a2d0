"""Answers of several models to the same prompts on a terminal: side by side if there is room, differences marked.

A row is an answer as in `samples.jsonl`, with the name of its model in `model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from dpo_cli.reporting.data_check import Wrapped
from dpo_cli.reporting.differences import Part, differences
from dpo_cli.reporting.safe_text import as_text
from dpo_cli.system.text import several

Row = Mapping[str, Any]

_NARROWEST_COLUMN, _PIPE_WIDTH = 34, 1000
"""Cells of a column below which answers are below each other, and a width that no terminal has."""

_SIGNS = "\n<["
"""What a template may begin with behind a prompt."""

_WITH_TEMPLATE, _OF_TEMPLATES = "(with what the template writes) ", ("<", "[", "###")
"""What is said before a prompt that is shown with its template, and by what one knows that there may be one."""

_INDENT, _PROMPT_LINES = 2, 8
_STYLES, _MARKS = ("red", "green"), (("[-", "-]"), ("{+", "+}"))
"""How a difference looks in the first answer and in others: with colours, and without."""


class AnswersBeside:
    """Answers to one prompt.

    Args:
        number: Of the prompt.
        rows: The answers, a row a model, in the order of the models.
        colour: Whether colours are seen; without them, differences are between marks.
    """

    def __init__(self, number: int, rows: Sequence[Row], *, colour: bool) -> None:
        self._number, self._rows, self._colour = number, rows, colour

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[ConsoleRenderable]:
        first = self._rows[0]
        yield Wrapped(Text.assemble((f"{self._number}. ", "bold"), (as_text(first["where"]), "dim")))
        yield Wrapped(Text(as_text(first["prompt"].strip()), "cyan"), indent=_INDENT, max_lines=_PROMPT_LINES)
        # Before they are cut into parts: half a secret would not be recognized.
        parts = compared([as_text(row["answer"]) for row in self._rows])
        texts = [self._text(some, int(number > 0)) for number, some in enumerate(parts)]
        width = options.max_width // len(texts)
        if len(texts) > 1 and width >= _NARROWEST_COLUMN and options.max_width < _PIPE_WIDTH:
            yield self._columns(texts)
        else:
            yield Group(*self._below_each_other(texts))

    def _columns(self, texts: Sequence[Text]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
        for row in self._rows:
            table.add_column(self._headline(row), ratio=1, overflow="fold")
        table.add_row(*texts)
        return table

    def _below_each_other(self, texts: Sequence[Text]) -> Iterator[ConsoleRenderable]:
        for row, text in zip(self._rows, texts, strict=True):
            yield Wrapped(self._headline(row), indent=_INDENT)
            yield Wrapped(text, indent=2 * _INDENT)

    def _headline(self, row: Row) -> Text:
        first = self._rows[0]
        same = ", the same" if row is not first and row["answer"] == first["answer"] else ""
        return Text.assemble((as_text(row["model"]), "bold"), (f"  {length_line(row)}{same}", "dim"))

    def _text(self, parts: Sequence[Part], other: int) -> Text:
        """Return an answer with what differs marked; `other`: 0 for the first answer, 1 for those compared with it."""
        text = Text()
        for part in parts:
            bare = part.text.lstrip()
            text.append(part.text[: len(part.text) - len(bare)])
            before, after = _MARKS[other] if part.differs and not self._colour and bare else ("", "")
            text.append(f"{before}{bare}{after}", _STYLES[other] if part.differs and self._colour else "")
        return text if text.plain.strip() else Text("(nothing)", "dim")


def with_bare_prompts(prompts: Sequence[Sequence[Row]], known: Sequence[str] | None = None) -> list[list[Row]]:
    """Return the rows of each prompt with the prompt as a person reads it: as it is known, else by `bare_prompts`."""
    bare = known or bare_prompts([rows[0]["prompt"] for rows in prompts])
    return [[{**row, "prompt": text} for row in rows] for rows, text in zip(prompts, bare, strict=True)]


def bare_prompts(texts: Sequence[str]) -> list[str]:
    """Leave out of prompts the lines that all of them begin with, and what the template writes at the end of all.

    Of one prompt alone nobody knows what the template wrote; where there may be something, that is said before it.
    """
    if len(set(texts)) < 2:
        return [f"{_WITH_TEMPLATE}{text}" if any(sign in text for sign in _OF_TEMPLATES) else text for text in texts]
    start = _common_start(texts).rfind("\n") + 1
    rest = [text[start:] for text in texts]
    tail = _common_start([text[::-1] for text in rest])[::-1]
    places = [tail.index(sign) for sign in _SIGNS if sign in tail]
    end = len(tail) - min(places) if places else 0
    return [f"{'…' * bool(start)}{text[: len(text) - end]}" for text in rest]


def _common_start(texts: Sequence[str]) -> str:
    """Return what texts begin with in common."""
    first, last = min(texts), max(texts)
    differs = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differs, len(first))]


def compared(answers: Sequence[str]) -> Iterator[list[Part]]:
    """Yield the parts of each answer: others are compared with the first, and that with the second of two."""
    first, *others = answers
    yield differences(first, others[0] if len(others) == 1 else first)[0]
    for other in others:
        yield differences(first, other)[1]


def length_line(row: Row) -> str:
    """Say how long an answer is, and whether it came to its end."""
    tokens = several(row["tokens"], "token")
    return tokens if row["ended"] else f"{tokens}, cut off"
