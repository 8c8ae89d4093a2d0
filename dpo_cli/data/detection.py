"""Which shape the rows of a source have: that which most of them fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpo_cli.data import fields
from dpo_cli.data.formats import FORMATS, Shape
from dpo_cli.data.records import Row
from dpo_cli.errors import UserError

DETECTION_ROWS = 1000
"""How many of a source's first rows are looked at."""

_MOST_COLUMNS = 12


def detect(rows: Sequence[Row], where: str) -> str:
    """Return the name of the shape that most rows fit; of several the first in the table.

    Where none fits, the columns' names decide, so that the rows' own errors are told.
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
            return named[0]
        known = "; ".join(f"{name}: {', '.join(shape.example)}" for name, shape in FORMATS.items())
        hint = f"name the columns as one of the shapes does ({known}), or force one with `data.format`; docs/shapes.md"
        raise UserError(f"the rows are of no known shape: they have {_columns(rows)}", where, hint)
    return best


def _has_columns(row: Mapping[str, object], shape: Shape) -> bool:
    """Tell whether a row has the columns of a shape, whatever is in them, and these are more than two answers."""
    needed = shape.example.keys() - {"input"}
    return len(needed) > 2 and needed <= row.keys()


def _columns(rows: Sequence[Row]) -> str:
    """List the columns of some rows, with the kinds of values that are in them."""
    kinds: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in (row.values or {}).items():
            kinds.setdefault(fields.printable(name), {})[fields.kind(value)] = None
    listed = [f"`{name}` ({' or '.join(found)})" for name, found in kinds.items()]
    more = f" and {len(listed) - _MOST_COLUMNS} more" if len(listed) > _MOST_COLUMNS else ""
    return (", ".join(listed[:_MOST_COLUMNS]) or "no columns") + more
