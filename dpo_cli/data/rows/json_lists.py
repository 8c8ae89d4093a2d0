"""A JSON list becomes rows while only a window of the file is in memory."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.data.records import Row
from dpo_cli.data.rows import streams
from dpo_cli.data.rows.fields import printable, repeated
from dpo_cli.errors import UserError


class _Repeated(dict[str, Any]):
    """An object in which a key occurs twice, so that nobody knows which value is meant."""

    key = ""


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) == len(members):
        return found
    unsure = _Repeated(found)
    unsure.key = repeated([name for name, _ in members]) or ""
    return unsure


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Decodes rows; `as_row` refuses what it cannot be sure of."""

_SPACE = re.compile(r"[ \t\r\n]*")
_MAX_LEVELS = 64
"""What is nested deeper is no row of conversations, and more than other processes can be sent."""

_NOT_UTF_8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are not UTF-8."""


class Window:
    """The part of a file that is being decoded; it moves along the file and grows to hold a value.

    Args:
        file: The file's bytes.
        path: What errors call it.

    Attributes:
        line: The line at which the window begins.
    """

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self.line = 1
        self._file, self._path = file, path
        # A byte that is not UTF-8 spoils its row and no other.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._start, self._ended = "", 0, False
        self._text = self._decoder.decode(streams.without_mark(file.read(4), path))

    def character(self) -> str:
        """Pass over white space and return the character there, which stays; nothing at the file's end."""
        while True:
            self._move(self._after_space(self._start))
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._grow():
                return ""

    def step(self) -> str:
        """Pass over one character, and return what `character` says then."""
        self._move(self._start + 1)
        return self.character()

    def value(self) -> tuple[Any, str]:
        """Pass over the value that begins here; return it and its text.

        Raises:
            UserError: It is broken, so that what follows cannot be read either.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._start)
            except json.JSONDecodeError as error:
                # Perhaps the window is too small to see all of it.
                if not self._grow():
                    raise self.broken(error.msg, error.pos) from None
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError as error:
                raise self.broken(str(error)) from None
            else:
                if isinstance(value, dict) or self._is_over(end) or not self._grow():
                    text = self._text[self._start : end]
                    self._move(end)
                    return value, text

    def broken(self, reason: str, place: int | None = None) -> UserError:
        """Say on which line the JSON breaks."""
        place = self._start if place is None else place
        line = self.line + self._text.count("\n", self._start, place)
        if found := _NOT_UTF_8.match(self._text, place):
            reason = _named_byte(found[0])
        hint = "fix that line; the rest of a JSON list cannot be read past it (JSON lines can)"
        return UserError(f"the file is not valid JSON: {reason}", f"{self._path}:{line}", hint)

    def _is_over(self, end: int) -> bool:
        """Tell whether a value is seen to end: `12` may go on as `123`."""
        return self._text[(after := self._after_space(end)) : after + 1] in {",", "]"}

    def _after_space(self, place: int) -> int:
        match = _SPACE.match(self._text, place)
        return match.end() if match else place

    def _move(self, place: int) -> None:
        self.line += self._text.count("\n", self._start, place)
        self._start = place

    def _grow(self) -> bool:
        """Read on, as much again as the window holds; tell whether anything could change by that."""
        rest = self._text[self._start :]
        if self._ended or len(rest) > streams.MAX_ROW_BYTES:
            return False
        data = self._file.read1(max(streams.BLOCK_BYTES, len(rest)))
        self._ended = not data
        self._text, self._start = rest + self._decoder.decode(data, final=self._ended), 0
        return True


def members(window: Window, path: Path) -> Iterator[Row]:
    """Yield the members of the list that begins at the window; several on one line are distinguished by their numbers.

    Raises:
        UserError: The list is broken; the members before that have been yielded.
    """
    closed = window.step() == "]"
    number, line_before = 0, 0
    while not closed:
        number, line = number + 1, window.line
        yield _member(window, f"{path}:{line}" + (f", row {number}" if line == line_before else ""))
        line_before = line
        separator = window.character()
        if separator not in {",", "]"}:
            raise window.broken("expected a comma or the list's end")
        closed = separator == "]"
        if not closed:
            window.step()
    if window.step():
        raise window.broken("something follows the list's end")


def _member(window: Window, origin: str) -> Row:
    value, text = window.value()
    if not text.isascii() and (found := _NOT_UTF_8.search(text)):
        return Row(origin, None, f"the row is not UTF-8: {_named_byte(found[0])}")
    return as_row(value, origin)


def _named_byte(escaped: str) -> str:
    return f"byte {ord(escaped) - 0xDC00:#04x}"


def as_row(value: object, origin: str) -> Row:
    """Accept an object; refuse any other JSON value, and one that is too deep to be handed on or has a key twice."""
    if not isinstance(value, dict):
        return Row(origin, None, "the row is not a JSON object")
    if problem := _problem_within(_MAX_LEVELS, value):
        return Row(origin, None, problem)
    return Row(origin, value)


def _problem_within(num_levels: int, value: dict[str, Any] | list[Any]) -> str:
    """Say what is wrong with lists and objects within a value, the value itself included; or nothing."""
    if not num_levels:
        return f"the row is nested more than {_MAX_LEVELS} levels deep"
    if isinstance(value, _Repeated):
        return f"the row has the key `{printable(value.key)}` twice in one object"
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)) and (problem := _problem_within(num_levels - 1, inner)):
            return problem
    return ""
