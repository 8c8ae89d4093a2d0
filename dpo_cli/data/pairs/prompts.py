"""Prompts by themselves, without responses: lines of text, or rows of any kind of data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.data.pairs.extra_columns import read_columns
from dpo_cli.data.pairs.messages import Messages, read_messages, read_prompt, read_question, read_system
from dpo_cli.data.pairs.sources import as_sources, check_source, read_rows
from dpo_cli.data.records import BadRow, Row
from dpo_cli.data.rows.fields import listed
from dpo_cli.data.rows.text_files import rows_of_lines
from dpo_cli.errors import UserError, from_os_error, raise_all
from dpo_cli.settings import located
from dpo_cli.system.storage import MANIFEST
from dpo_cli.system.text import several

_FORMS = "a prompt is a line of a .txt file, or a row with `prompt`, `instruction` (and `input`) or `messages`"
_PROBLEMS = 8
"""How many bad rows are reported one by one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked.

    Attributes:
        messages: The conversation up to where the assistant answers.
        origin: Where it was read: `prompts.txt:3`.
        arguments: What the chat template is given beside the messages.
    """

    messages: Messages
    origin: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def is_text(path: str) -> bool:
    """Tell whether a file has a prompt on each line, and not rows."""
    return Path(path).suffix.lower() == ".txt"


def check_prompts(path: str, where: str) -> UserError | None:
    """Say what is wrong with the name of a file of prompts, without reading any."""
    if is_text(path):
        if Path(path).is_file():
            return None
        return UserError(f"there is no file {located(path)}", where, "check the path")
    if (Path(path) / MANIFEST).is_file():
        return UserError(f"`{path}` is a prepared folder", where, "name the data that it was prepared from")
    return check_source(as_sources(path)[0], where)


def read_prompts(path: str, count: int | None = None, system: str = "") -> list[Prompt]:
    """Read prompts; of rows that have responses too, these are ignored.

    Args:
        path: A .txt file with a prompt on each line, or a source of rows.
        count: How many are read from the start; None: all.
        system: The system's turn of conversations without one, or nothing.

    Raises:
        UserError: The file cannot be read, or has no prompt; an `ExceptionGroup` where several rows are none.
    """
    found: list[Prompt] = []
    problems: list[UserError] = []
    try:
        rows = rows_of_lines(Path(path), _of_line) if is_text(path) else read_rows(as_sources(path)[0])
        for row in itertools.islice(rows, count):
            try:
                found.append(_prompt(row, system))
            except BadRow as bad:
                problems.append(UserError(bad.detail, row.origin, _FORMS))
    except OSError as error:
        raise from_os_error(error, "reading the prompts", path, status=2) from error
    if len(problems) > _PROBLEMS:
        more = several(len(problems) - _PROBLEMS, "more row is no prompt", "more rows are no prompts")
        rest = UserError(more, path, _FORMS)
        raise_all([*problems[:_PROBLEMS], rest])
    raise_all(problems)
    if not found:
        raise UserError("there are no prompts", path, _FORMS)
    return found


def _of_line(line: bytes, origin: str) -> Row:
    """Take a line of a text for a prompt."""
    try:
        return Row(origin, {"prompt": line.decode("utf-8")})
    except UnicodeDecodeError as error:
        return Row(origin, None, f"the line is not UTF-8: byte {line[error.start]:#04x}")


def _prompt(row: Row, system: str) -> Prompt:
    """Read a prompt and what belongs to it.

    Raises:
        BadRow: There is none.
    """
    if row.values is None:
        raise BadRow(row.reason, row.problem)
    messages = _asked(row.values)
    if messages[-1].role == "assistant":
        raise BadRow("no question", "the conversation ends with the assistant's turn, so there is nothing to answer")
    messages = read_system(row.values, messages, system) + messages
    return Prompt(messages, row.origin, read_columns(row.values).get("arguments", {}))


def _asked(values: Mapping[str, object]) -> Messages:
    """Return the messages of the first column that holds a prompt."""
    if values.get("prompt") is not None:
        return read_prompt(values)
    if values.get("instruction") is not None:
        return read_question(values, "instruction")
    if values.get("messages") is not None:
        return read_messages(values["messages"], "messages")
    raise BadRow("no prompt", f"the row has no prompt; it has {listed(values)}")
