"""Rows that each judge one answer become rows that hold two: of a prompt, the k-th good answer with the k-th bad one.

The two may be anywhere in a source. In memory there are, of each row, a digest of its prompt, its label and where it
stands in a file, in which the rows themselves wait until all have been read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.data.pairs.columns import read_columns
from dpo_cli.data.pairs.conversations import after, check_answers, check_end, read_prompt, read_system, read_turns
from dpo_cli.data.records import LABELS, NUMBERS, BadRow, Cell, Row
from dpo_cli.data.rows import fields

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_KEPT = (
    "prompt", "input", "history", "system", "completion", "tools", "chat_template_kwargs", *NUMBERS, *LABELS,
)  # fmt: skip
"""The columns that are kept of a row while it waits."""

_KEY_BYTES = 8
_BAD, _GOOD, _UNUSABLE = range(3)
_LABELS = {"true": _GOOD, "1": _GOOD, "false": _BAD, "0": _BAD}
"""The two labels, by how JSON and CSV spell them, in lower case."""

_sorted_json = json.JSONEncoder(sort_keys=True).encode
_any_json = json.JSONEncoder(default=str).encode
"""What JSON has no type for can only be a label in what is kept of a row: it becomes text."""


def gather(rows: Iterator[Row], scratch: Path) -> Iterator[Row]:
    """Pair the rows of a source, each of them `{"prompt", "completion", "label"}`.

    Args:
        rows: All rows of the source.
        scratch: An empty folder, in which they wait.

    Yields:
        Where the first row of a pair stood, the pair: `{"prompt", "chosen", "rejected"}` and the other columns of
        the good one, read at `good+bad`. A row that cannot be read, or has no counterpart, where it stood.
    """
    with _Waiting(scratch / "rows.jsonl") as waiting:
        waiting.add(rows)
        for place, (partner, label) in enumerate(zip(waiting.partners(), waiting.labels, strict=True)):
            if label == _UNUSABLE:
                yield waiting.row(place)
            elif partner < 0:
                yield _alone(waiting.row(place), label)
            elif partner > place:
                good, bad = (place, partner) if label == _GOOD else (partner, place)
                yield _paired(waiting.row(good), waiting.row(bad))


class _Waiting(contextlib.AbstractContextManager["_Waiting"]):
    """Rows in a file, a line each, and what is remembered of them.

    Attributes:
        labels: The label of each, a byte.
    """

    def __init__(self, path: Path) -> None:
        self.labels = bytearray()
        self._keys, self._starts = array("Q"), array("Q")
        self._file = path.open("w+b")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Check rows and write them."""
        for row in rows:
            key, label, line = _judged(row)
            self._keys.append(key)
            self.labels.append(label)
            self._starts.append(self._file.tell())
            self._file.write(line.encode() + b"\n")

    def row(self, place: int) -> Row:
        """Read a row back."""
        self._file.seek(self._starts[place])
        row, cells = json.loads(self._file.readline())
        if cells:
            row[1] |= {name: Cell(row[1][name]) for name in cells}
        return Row(*row)

    def partners(self) -> NDArray[np.int64]:
        """Return for each row the one it is paired with, −1 where there is none, `[rows]`."""
        import numpy as np

        labels = np.frombuffer(self.labels, np.uint8)
        prompts = np.unique(np.frombuffer(self._keys, np.uint64), return_inverse=True)[1]
        good, good_turns = _turns(prompts, np.flatnonzero(labels == _GOOD))
        bad, bad_turns = _turns(prompts, np.flatnonzero(labels == _BAD))
        _, first, second = np.intersect1d(good_turns, bad_turns, assume_unique=True, return_indices=True)
        partners = np.full(len(labels), -1, np.int64)
        partners[good[first]], partners[bad[second]] = bad[second], good[first]
        return partners


def _turns(prompts: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the rows of one label: which prompt it is, and how many rows of that prompt came before.

    Args:
        prompts: The number of each row's prompt.
        rows: The rows of one label, ascending.

    Returns:
        The rows, those of one prompt together; and for each a number that no other has.
    """
    import numpy as np

    rows = rows[np.argsort(prompts[rows], kind="stable")]
    sorted_prompts = prompts[rows]
    before = np.arange(len(rows)) - np.searchsorted(sorted_prompts, sorted_prompts)
    return rows, sorted_prompts * len(prompts) + before


def _judged(row: Row) -> tuple[int, int, str]:
    """Check a row; return a digest of its prompt, its label, and itself as JSON."""
    key, label, kept = 0, _UNUSABLE, None
    try:
        if row.values is not None:
            key, label = _prompt_key(row.values, row.system), _label(row.values)
            kept = {name: row.values[name] for name in _KEPT if name in row.values}
        cells = [name for name, value in (kept or {}).items() if isinstance(value, Cell)]
        said = [row.origin, kept, row.problem, row.reason, row.structural, 1, row.system]
        return key, label, _as_json([said, cells])
    except BadRow as bad:
        return 0, _UNUSABLE, _as_json([[row.origin, None, bad.detail, bad.reason, bad.structural], []])


def _prompt_key(values: Mapping[str, object], system: str) -> int:
    """Check everything but the label, and digest what the model is given before its answer."""
    prompt = read_prompt(values)
    completion = after(prompt, read_turns(fields.field(values, "completion"), "completion"), "completion")
    check_end(completion, "completion")
    check_answers(completion, len(prompt), "completion")
    given = read_system(values, completion, system) + prompt
    turns = [(message.role, message.text, message.extras) for message in given]
    whole = _sorted_json([turns, read_columns(values).get("arguments")])
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=_KEY_BYTES).digest(), "little")


def _label(values: Mapping[str, object]) -> int:
    value = fields.field(values, "label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int)) and (label := _LABELS.get(str(value).strip().lower())) is not None:
        return label
    said = f"`{fields.printable(value)}`" if isinstance(value, (str, int, float)) else fields.kind(value)
    raise BadRow("wrong label", f"`label` is {said} instead of true or false, 1 or 0")


def _as_json(row: list[object]) -> str:
    try:
        return _any_json(row)
    except (RecursionError, TypeError, ValueError):
        raise BadRow("wrong type", "the row cannot be written as JSON") from None


def _alone(row: Row, label: int) -> Row:
    """Return a row that found no counterpart."""
    other = "bad" if label == _GOOD else "good"
    problem = f"no {other} answer to its prompt is left to pair it with"
    return Row(row.origin, None, problem, "no counterpart", structural=False)


def _paired(good: Row, bad: Row) -> Row:
    """Return the row of a pair; its weight is the mean of both."""
    assert good.values is not None and bad.values is not None
    values = dict(good.values)
    values |= {"chosen": values.pop("completion"), "rejected": bad.values["completion"]}
    weights = [good.values.get("weight"), bad.values.get("weight")]
    if weights != [None, None]:
        values["weight"] = sum(1.0 if one is None else fields.number(one, "weight") for one in weights) / 2
    return Row(f"{good.origin}+{bad.origin}", values, num_rows=2, system=good.system)
