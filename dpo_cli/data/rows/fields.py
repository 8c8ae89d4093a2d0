"""The columns of a row, and what is nested in them, as the types that they must have; or a `BadRow` that says where.

A place is how a value is named to a user: `chosen`, `chosen[2].content`. Where a list or an object belongs, its
JSON will do in a `Cell`: a CSV file has no other way to hold one. In other files text is text, JSON or not.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from dpo_cli.data.records import BadRow, Cell
from dpo_cli.errors import UserError
from dpo_cli.system.text import escaped

_FLOAT32 = struct.Struct("f")
_COLUMNS_NAMED = 12

_LIKE_PYTHON = re.compile(r"[\[{\s]*('|True\b|False\b|None\b)")
"""How lists and objects begin that Python wrote and not JSON: with a text in single quotes, or a word of its own."""


def field(row: Mapping[str, object], name: str) -> object:
    """Return a column that must be there and not null."""
    value = row.get(name)
    if value is None:
        raise BadRow("missing field", f"`{name}` is {'null' if name in row else f'missing; the row has {listed(row)}'}")
    return value


def text(value: object, place: str) -> str:
    """Return a value that must be text which can be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{place}` is {kind(value)} instead of text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("undecodable text", f"`{place}` has half of a surrogate pair") from None
    return str(value)


def optional_text(row: Mapping[str, object], name: str) -> str:
    """Return a column that is text, or the empty text where it is missing, null or white space."""
    value = row.get(name)
    found = "" if value is None else text(value, name)
    return found if found.strip() else ""


def items(value: object, place: str, of: str = "values") -> Sequence[object]:
    """Return a value that must be a list, or a cell that holds the JSON of one.

    Args:
        value: What is there.
        place: Where that is.
        of: What the list is made of, in words.
    """
    found = from_cell(value, place)
    if not isinstance(found, list):
        raise BadRow("wrong type", f"`{place}` is {_kind_read(found)} instead of a list of {of}")
    return found


def mapping(value: object, place: str) -> Mapping[str, object]:
    """Return a value that must be an object, or a cell that holds the JSON of one."""
    found = from_cell(value, place)
    if not isinstance(found, Mapping):
        raise BadRow("wrong type", f"`{place}` is {_kind_read(found)} instead of an object")
    return found


def mappings(value: object, place: str, of: str) -> list[dict[str, object]]:
    """Return a value that must be a list of objects, in any file as JSON text as well, and so each of them.

    Only for what is never text: files of columns often have calls and descriptions of tools as JSON.
    """
    listed = items(from_json(value, place), place, of)
    return [dict(mapping(from_json(one, at), at)) for one, at in ((o, f"{place}[{n}]") for n, o in enumerate(listed))]


def number(value: object, place: str) -> float:
    """Return a value that must be a finite number, rounded to the 32 bits in which it is kept."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong type", f"`{place}` is {kind(value)} instead of a number")
    try:
        found = float(_FLOAT32.unpack(_FLOAT32.pack(float(value)))[0])
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRow("number out of range", f"`{place}` is not finite as a 32-bit number")
    return found


def plain_json(value: Any, place: str) -> Any:
    """Return a value that must be plain JSON through and through, all its texts writable as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("undecodable text", f"`{place}` has half of a surrogate pair") from None
    except RecursionError:
        raise BadRow("wrong type", f"`{place}` is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise BadRow("wrong type", f"`{place}` is not plain JSON: {error}") from None
    return value


def from_cell(value: object, place: str) -> object:
    """Read the JSON of a list or an object in a cell; any other value, text above all, stays as it is."""
    return from_json(value, place) if isinstance(value, Cell) else value


def from_json(value: object, place: str) -> object:
    """Read a text that begins like a JSON list or object as what it says; any other value stays as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return cast(object, json.loads(value, object_pairs_hook=_members))
    except RecursionError:
        raise BadRow("wrong type", f"`{place}` is nested too deeply") from None
    except ValueError as error:
        if _LIKE_PYTHON.match(value):
            raise BadRow("wrong type", f"`{place}` is a Python literal, not JSON") from None
        raise BadRow("wrong type", f"`{place}` is text that is not valid JSON: {error}") from None


def listed(names: Iterable[object], most: int = _COLUMNS_NAMED) -> str:
    """Write names of the data in a row: `` `a`, `b`, … and 3 more ``."""
    return shortened([f"`{printable(name)}`" for name in names], most) or "nothing"


def shortened(shown: Sequence[str], most: int = _COLUMNS_NAMED) -> str:
    """Write the first of some things in a row, and how many more there are."""
    more = [f"… and {len(shown) - most:,} more"] if len(shown) > most else []
    return ", ".join([*shown[:most], *more])


def distinct(columns: Sequence[str], where: str) -> list[str]:
    """Return the names of columns, of which no two may be the same; those without a name cannot be confused."""
    for name in columns:
        if name and columns.count(name) > 1:
            raise UserError(f"two columns are called `{printable(name)}`", where, "give each column a different name")
    return list(columns)


def repeated(names: Sequence[str]) -> str | None:
    """Return the first of some names that occurs among them twice, or None."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _members(members: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's members; where a key occurs twice nobody knows which value is meant."""
    found = dict(members)
    if len(found) < len(members) and (name := repeated([name for name, _ in members])):
        raise ValueError(f"it has the key `{printable(name)}` twice in one object")
    return found


def printable(value: object, most: int = 40) -> str:
    r"""Return data as it can be shown: on one line, controlling no terminal, writable as UTF-8.

    Args:
        value: Mostly a text: a name, a key, a role.
        most: The characters of it that are shown. What cannot be is written as in Python: `\x1b`.
    """
    shown = str(value)
    cut = "…" if len(shown) > most else ""
    return escaped(shown[:most]) + cut


def _kind_read(value: object) -> str:
    """Name a value's type in words, and of text whether it is that of a list or an object."""
    return "JSON written as text" if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else kind(value)


def kind(value: object) -> str:
    """Name a JSON value's type in words."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"
