"""Which shape the rows of a source have: that which most of them fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpo_cli.data.pairs.messages import is_messages
from dpo_cli.data.pairs.renaming import proposed_columns, shown_columns, under_other_names
from dpo_cli.data.pairs.shapes import FORMATS, Shape
from dpo_cli.data.records import Cell, Row
from dpo_cli.data.rows import fields
from dpo_cli.data.rows.fields import listed, shortened
from dpo_cli.errors import UserError

DETECTION_ROWS = 1000
"""How many of a source's first rows are looked at."""


def detect(rows: Sequence[Row], where: str) -> str:
    """Return the name of the shape that most rows fit; of several the first in the table.

    Where none fits, the columns' names decide, so that the rows' own errors are reported.
    Where no row could be read at all, any shape will do to say so of each of them.

    Args:
        rows: The source's first rows, up to `DETECTION_ROWS`.
        where: What the source is called.

    Raises:
        UserError: No row fits any shape.
    """
    readable = [row.values for row in rows if row.values is not None]
    fitting = {name: sum(map(shape.fits, readable)) for name, shape in FORMATS.items()}
    best = max(fitting, key=lambda name: fitting[name])
    if readable and not fitting[best]:
        if named := [name for name, shape in FORMATS.items() if any(_has_columns(row, shape) for row in readable)]:
            # Reading the rows as that tells better than we could here what is wrong with each.
            return max(named, key=lambda name: sum(_num_alike(row, FORMATS[name]) for row in readable))
        raise UserError(f"the rows have no known shape: they have {_columns(readable)}", where, _hint(readable))
    if readable and all(map(_is_all_messages_as_text, readable)):
        hint = "write them as lists of objects; if they are meant as text, set `data.format: text`"
        raise UserError("prompts and answers are lists of messages, written as JSON text", where, hint)
    return best


def _is_all_messages_as_text(row: Mapping[str, object]) -> bool:
    """Tell whether prompt and answers of a row all are the JSON text of messages; one alone may be an answer."""
    texts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    return all(isinstance(one, str) and not isinstance(one, Cell) and is_messages(Cell(one)) for one in texts)


def _hint(rows: Sequence[Mapping[str, object]]) -> str:
    """Say how rows that fit no shape can be read: with the columns' names guessed, or as the nearest shape."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if guess := guessed_columns(rows):
        return f"set `data.columns: {shown_columns(guess)}`, if that is correct"
    if written := list(dict.fromkeys(name for row in rows for name in _lists_as_text(row))):
        return f"{listed(written)} are lists or objects written as JSON text, which only CSV and TSV allow: write lists"
    if any(is_messages(row.get("messages")) and row.keys() >= {"chosen", "rejected"} for row in rows):
        return "`messages` is a prompt if its last turn is not the assistant's: remove the answer from it"
    there = {name: [need for need in _needed(shape) if need in names] for name, shape in FORMATS.items()}
    # Of several that share as much, most people mean plain texts.
    nearest = max(FORMATS, key=lambda name: (len(there[name]), name == "text"))
    lacking = [need for need in _needed(FORMATS[nearest]) if need not in there[nearest]]
    what = f"the nearest shape is `{nearest}`, which also needs {listed(lacking)}"
    if len(names) - len(there[nearest]) < len(lacking):
        return f"{what}, for which the rows have no columns left: write rows with a better and a worse answer"
    return f"{what}: map the data's columns with `data.columns: {{{', '.join(f'{name}: …' for name in lacking)}}}`"


def _lists_as_text(row: Mapping[str, object]) -> list[str]:
    """Return the columns that keep a row from fitting a shape by being JSON text: in a CSV file the row would fit."""
    read = {name: Cell(value) if isinstance(value, str) else value for name, value in row.items()}
    if not any(shape.fits(read) for shape in FORMATS.values()):
        return []
    return [name for name, value in read.items() if isinstance(value, Cell) and value.lstrip()[:1] in ("[", "{")]


def guessed_columns(rows: Sequence[Mapping[str, object]]) -> dict[str, str] | None:
    """Return what `data.columns` would have to be for rows that fit no shape to fit one; None where nothing does it."""
    if any(shape.fits(row) for row in rows for shape in FORMATS.values()):
        return None
    guess = proposed_columns(dict.fromkeys(name for row in rows for name in row))
    fits = guess and any(shape.fits(under_other_names(row, guess)) for row in rows for shape in FORMATS.values())
    return guess if fits else None


def _needed(shape: Shape) -> list[str]:
    """Return the columns that rows of a shape must have."""
    return [name for name in shape.example if name != "input"]


def _has_columns(row: Mapping[str, object], shape: Shape) -> bool:
    """Tell whether a row has the columns of a shape, whatever is in them, and these are more than two answers."""
    needed = _needed(shape)
    return len(needed) > 2 and row.keys() >= {*needed}


def _num_alike(row: Mapping[str, object], shape: Shape) -> int:
    """Count the columns of a row that are of the kind that they have in the example of a shape."""
    return sum(fields.kind(row.get(name)) == fields.kind(value) for name, value in shape.example.items())


def _columns(rows: Sequence[Mapping[str, object]]) -> str:
    """List the columns of some rows, with the kinds of values that are in them."""
    kinds: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(fields.printable(name), {})[fields.kind(value)] = None
    shown = [f"`{name}` ({' or '.join(found)})" for name, found in kinds.items()]
    return shortened(shown) or "no columns"
