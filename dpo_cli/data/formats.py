"""One function per dataset shape: a row becomes a `Pair`, or a `BadRow` that says why not."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from dpo_cli.data.records import NUMBERS, BadRow, Message, Pair

Format = Callable[[Mapping[str, object], str], Pair]

_FLOAT32 = struct.Struct("f")


def read_pair(shape: Format, row: Mapping[str, object], origin: str) -> Pair:
    """Read a row of a shape, and the `weight` and the `margin` that a row of any shape may have.

    Raises:
        BadRow: As the shape does; or one of the two is not a finite number, or the weight is negative.
    """
    pair = shape(row, origin)
    numbers: dict[str, Any] = {name: _number(row, name) for name in NUMBERS if row.get(name) is not None}
    if numbers.get("weight", 0.0) < 0:
        raise BadRow("number out of range", "`weight` is negative")
    return dataclasses.replace(pair, **numbers) if numbers else pair


def instruction(row: Mapping[str, object], origin: str) -> Pair:
    """Read `{"instruction", "input" (optional), "chosen", "rejected"}`, all of them text.

    Raises:
        BadRow: A field is missing, empty or not text, or the two responses are the same.
    """
    prompt = _text(row, "instruction")
    given = _text(row, "input") if row.get("input") is not None else ""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not prompt.strip():
        raise BadRow("empty field", "`instruction` is empty")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise BadRow("empty response", f"`{name}` is empty", structural=False)
    if chosen == rejected:
        raise BadRow("identical responses", "`chosen` and `rejected` are the same text", structural=False)
    return Pair(
        prompt=Message("user", prompt, given if given.strip() else ""),
        chosen=Message("assistant", chosen),
        rejected=Message("assistant", rejected),
        origin=origin,
    )


def _text(row: Mapping[str, object], name: str) -> str:
    """Return a field that must be text which can be written as UTF-8."""
    value = row.get(name)
    if value is None:
        known = ", ".join(f"`{column}`" for column in list(row)[:12]) or "nothing"
        raise BadRow("missing field", f"`{name}` is {'null' if name in row else f'missing; the row has {known}'}")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{name}` is {_kind(value)} instead of text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("undecodable text", f"`{name}` holds half of a surrogate pair") from None
    return value


def _number(row: Mapping[str, object], name: str) -> float:
    """Return a field that must be a number, rounded to the 32 bits in which it is kept."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong type", f"`{name}` is {_kind(value)} instead of a number")
    try:
        number = float(_FLOAT32.unpack(_FLOAT32.pack(float(value)))[0])
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow("number out of range", f"`{name}` is not finite as a number of 32 bits")
    return number


def _kind(value: object) -> str:
    """Name a JSON value's type in words."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


FORMATS: dict[str, Format] = {
    "instruction": instruction,
}
