"""Columns under other names: the data's names for the columns that a shape has, set or guessed."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from dpo_cli.data.pairs.shapes import FORMATS
from dpo_cli.data.records import LABELS, NUMBERS, Row
from dpo_cli.data.rows.fields import listed, printable
from dpo_cli.errors import UserError, raise_all
from dpo_cli.settings import contradiction
from dpo_cli.system import plain_yaml

Columns = Mapping[str, str]
"""The column of the data by the name that a shape has for it."""

KNOWN = tuple(
    dict.fromkeys(
        [
            *(name for shape in FORMATS.values() for name in shape.example),
            *(
                "system",
                "history",
                "conversation",
                "messages",
                "ranks",
                "response_0",
                "response_1",
                "response_2",
                "tools",
                "chat_template_kwargs",
                *NUMBERS,
                *LABELS,
            ),
        ]
    )
)
"""The columns that shapes read, and those that a row of any shape may have beside them."""

_PROMPTS = (
    "prompt", "instruction", "conversations", "conversation", "question", "query", "user_prompt", "user_message",
    "user_input", "input", "problem", "task", "context", "post", "history",
)  # fmt: skip
_AS_THEY_ARE = ("prompt", "instruction", "conversations", "conversation")
"""Of the columns that hold a prompt, those that some shape reads by that name."""

_PREFERENCES = (
    ("chosen", "rejected"), ("accepted", "rejected"), ("preferred", "rejected"), ("preferred", "dispreferred"),
    ("preferred", "non_preferred"),
    ("positive", "negative"), ("pos", "neg"), ("good", "bad"), ("better", "worse"), ("best", "worst"),
    ("winner", "loser"), ("win", "lose"), ("w", "l"), ("j", "k"),
)  # fmt: skip
"""How names tell the better answer from the worse; a and b, or 1 and 2, do not tell."""

_ANSWERS = (
    "response", "answer", "completion", "output", "reply", "generation", "summary", "message", "messages", "text",
    "conversation", "sample", "y",
)  # fmt: skip
_OTHERS = {
    "completion": ("completion", "response", "answer", "output", "reply", "generation"),
    "label": ("label", "labels", "desirable", "is_good", "is_desirable", "thumbs_up"),
    "responses": ("responses", "answers", "completions", "candidates", "outputs", "generations"),
    "scores": ("scores", "ratings", "rewards"),
    "ranks": ("ranks", "rank", "ranking", "rankings"),
}


_WINNERS = (
    "winner", "preference", "preferred", "preferred_response", "preferred_answer", "better", "better_response",
    "better_answer", "better_response_id", "choice", "verdict", "vote", "chosen_response", "best",
)  # fmt: skip
"""How columns are called that name the better of two answers."""


def _check(columns: dict[str, str]) -> dict[str, str]:
    """Refuse what is no mapping of the data's columns to those of shapes, whatever the data."""
    for name, column in columns.items():
        if name not in KNOWN:
            raise contradiction(
                f"`{printable(name)}` in `columns` is not a column that a shape reads", _instead_of(name, column)
            )
        if twice := next((other for other in columns if other != name and columns[other] == column), None):
            what = f"`{name}` and `{twice}` in `columns` are both read from the column `{printable(column)}`"
            raise contradiction(what, "leave one of them out, or name another column for it")
    return columns


def _instead_of(name: str, column: str) -> str:
    """Suggest what to write instead of a name that no shape knows."""
    if column in KNOWN:
        return f"write it the other way round, `{column}: {printable(name)}`: the shape's name comes first"
    near = difflib.get_close_matches(name, KNOWN, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known here: {listed(KNOWN, len(KNOWN))}"


ColumnNames = Annotated[
    dict[str, Annotated[str, Field(min_length=1)]],
    AfterValidator(_check),
    Field(json_schema_extra={"propertyNames": {"enum": list(KNOWN)}}),
]
"""What a setting that renames columns accepts."""


def renamed(rows: Iterable[Row], columns: Columns, system: str) -> Iterator[Row]:
    """Yield rows with their columns under the names that shapes know.

    Args:
        rows: As they were read.
        columns: The data's column by each such name; columns that are not in it keep theirs.
        system: The system's turn of conversations that have none, or nothing.
    """
    for row in rows:
        values, problem = row.values, row.problem
        if values is not None and (name := next((name for name in columns if _is_twice(name, values, columns)), None)):
            values, problem = None, f"`{name}` is there twice: the row has it, and `{printable(columns[name])}`"
        elif values is not None:
            values = under_other_names(values, columns)
        yield dataclasses.replace(row, values=values, problem=problem, system=system)


def under_other_names(values: Mapping[str, object], columns: Columns) -> dict[str, object]:
    """Return a row's values by the names that shapes know."""
    taken = columns.values()
    kept = {name: value for name, value in values.items() if name not in taken}
    return kept | {name: values[column] for name, column in columns.items() if column in values}


def _is_twice(name: str, values: Mapping[str, object], columns: Columns) -> bool:
    """Tell whether a row has a column by the name that another is to have."""
    return columns[name] in values and values.get(name) is not None and name not in columns.values()


def check_columns(rows: Sequence[Row], columns: Columns, where: str) -> None:
    """Find out whether a mapping is of these rows.

    Args:
        rows: The source's first rows, as they were read.
        columns: The data's column by each name that a shape knows.
        where: What the source is called.

    Raises:
        UserError: No row has one of the columns, or rows have the new name already.
        ExceptionGroup: Several of these.
    """
    there = [row.values for row in rows if row.values is not None]
    if there:
        raise_all(problem for name, column in columns.items() if (problem := _problem(there, name, columns, where)))


def _problem(rows: Sequence[Mapping[str, object]], name: str, columns: Columns, where: str) -> UserError | None:
    column = columns[name]
    known = list(dict.fromkeys(name for row in rows for name in row))
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1)
        none = "for a source whose columns keep their names, set `columns: {}`"
        hint = f"did you mean `{printable(near[0])}`?" if near else f"the rows have {listed(known)}; {none}"
        what = f"no row has a column `{printable(column)}`, which `data.columns` maps to `{name}`"
        return UserError(what, where, hint)
    if any(_is_twice(name, row, columns) for row in rows):
        what = f"the column `{printable(column)}` is mapped to `{name}`, but the rows also have a column `{name}`"
        return UserError(what, where, f"leave `{name}` out of `data.columns`, or remove the other column from the data")
    return None


def shown_columns(columns: Columns) -> str:
    """Write a mapping as YAML has it in a line."""
    return plain_yaml.written(dict(columns))


def proposed_columns(columns: Iterable[str]) -> dict[str, str] | None:
    """Guess by their names which columns hold a prompt and its answers.

    Args:
        columns: The names of all columns of some rows.

    Returns:
        What `data.columns` would have to be, or None where no name has to change or nothing can be guessed.
    """
    normalized = {_normalized(name): name for name in reversed(list(columns))}
    for guess in (_preference, _verdict, _judgement, _ranking):
        if found := guess(normalized):
            return {name: column for name, column in found.items() if name != column} or None
    return None


def _normalized(name: str) -> str:
    """Return a name in small letters, its words joined by underscores."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


def _preference(normalized: Mapping[str, str]) -> dict[str, str]:
    """Guess a prompt, the better and the worse answer; the prompt may be within the answers."""
    for better, worse in _PREFERENCES:
        for name in normalized:
            words = name.split("_")
            other = "_".join(worse if word == better else word for word in words)
            if better in words and other in normalized and {*words} - {better} <= {*_ANSWERS}:
                if len(words) == 1 and len(better) == 1:
                    continue
                return _prompt(normalized) | {"chosen": normalized[name], "rejected": normalized[other]}
    return {}


def _verdict(normalized: Mapping[str, str]) -> dict[str, str]:
    """Guess a prompt, two answers that letters or numbers tell apart, and which of them is better."""
    label = _first(_OTHERS["label"], normalized)
    verdict = _first(_WINNERS, normalized)
    said = {"winner": verdict} if verdict else {"label": label} if label else {}
    for ends in (("a", "b"), ("1", "2"), ("0", "1")):
        for name in normalized:
            words = re.findall(r"[a-z]+|\d+", name)
            other = name.removesuffix(ends[0]) + ends[1]
            are_answers = words[-1:] == [ends[0]] and words[:-1] and {*words[:-1]} <= {*_ANSWERS, "human", "ref"}
            if said and are_answers and other in normalized:
                two = {f"response_{end}": normalized[column] for end, column in zip(ends, (name, other), strict=True)}
                return _prompt(normalized) | two | {name: normalized[column] for name, column in said.items()}
    return {}


def _prompt(normalized: Mapping[str, str]) -> dict[str, str]:
    name = _first(_PROMPTS, normalized)
    return {} if name is None else {name if name in _AS_THEY_ARE else "prompt": normalized[name]}


def _judgement(normalized: Mapping[str, str]) -> dict[str, str]:
    """Guess a prompt, an answer and whether it is good."""
    return _all_of(normalized, "completion", "label")


def _ranking(normalized: Mapping[str, str]) -> dict[str, str]:
    """Guess a prompt, its answers, and how good each of them is."""
    return _all_of(normalized, "responses", "scores") or _all_of(normalized, "responses", "ranks")


def _all_of(normalized: Mapping[str, str], *names: str) -> dict[str, str]:
    """Guess a prompt and some other columns, or none of them."""
    found = {"prompt": _first(_PROMPTS, normalized)} | {name: _first(_OTHERS[name], normalized) for name in names}
    return {name: normalized[column] for name, column in found.items() if column} if all(found.values()) else {}


def _first(names: Iterable[str], normalized: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in normalized), None)
