"""Marks that no other text holds, put into JSON values to see what a template makes of a part of them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


def numbered_mark(number: int) -> str:
    """Return a text that neither data nor templates have: of code points that are no characters."""
    return f"\ufdd5{number}\ufdd5"


def marks_in(text: str | None) -> frozenset[str]:
    """Return all marks in what was written."""
    return frozenset(re.findall("\ufdd5[0-9]+\ufdd5", text or ""))


def with_mark_at(value: Any, path: Sequence[str | int], mark: str) -> Any:
    """Return a JSON value with a mark at a path; an object, and the JSON text of one, stay what they are."""
    there = functools.reduce(lambda outer, step: outer[step], path, value)
    other: Any = {mark: mark} if isinstance(there, Mapping) else mark
    if path[-1] == "arguments" and isinstance(there, str):
        other = json.dumps({mark: mark}, ensure_ascii=False)
    return replaced(value, path, other)


def replaced(value: Any, path: Sequence[str | int], other: Any) -> Any:
    """Return a JSON value with another at a path."""
    if not path:
        return other
    first, *rest = path
    inner = replaced(value[first], rest, other)
    if isinstance(first, int):
        return [*value[:first], inner, *value[first + 1 :]]
    return {**value, first: inner}


def with_mark(value: Any, mark: str) -> Any:
    """Return a JSON value with a mark at the end of each of its texts, but of those that name a type."""
    if isinstance(value, Mapping):
        return {name: item if name == "type" else with_mark(item, mark) for name, item in value.items()}
    if isinstance(value, list):
        return [with_mark(item, mark) for item in value]
    return value + mark if isinstance(value, str) else value


def another_value(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    mark = numbered_mark(0)
    return with_mark(value, mark) if isinstance(value, str) or value else [mark]
