"""Rows of one answer and a label become rows of two answers: of each prompt, the k-th good one and the k-th bad one.

The two may be anywhere in a source. In memory there are, of each row, a digest of its prompt, its label and its offset
in a file, in which the answers themselves wait until all rows have been read. A row is parsed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dpo_cli.data.pairs.conversations import after, check_answers, check_end, preference
from dpo_cli.data.pairs.extra_columns import read_columns
from dpo_cli.data.pairs.messages import Messages, read_prompt, read_system, read_turns
from dpo_cli.data.records import BadRow, Message, Pair, Row
from dpo_cli.data.rows import fields

_KEY_BYTES = 8
_BAD, _GOOD, _UNUSABLE = range(3)
_LABELS = {"true": _GOOD, "1": _GOOD, "false": _BAD, "0": _BAD}
"""The two labels, as JSON and CSV write them, in lower case."""

_sorted_json = json.JSONEncoder(sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it was parsed.

    Attributes:
        system: The system's turn that is apart from the prompt, or nothing.
        prompt: The turns before it.
        response: The answer, and what follows it.
        columns: The fields of a `Pair` that its row gives.
    """

    system: Messages
    prompt: Messages
    response: Messages
    columns: Mapping[str, Any]

    def as_json(self) -> list[object]:
        """Return it as JSON can hold it."""
        turns = [[dataclasses.astuple(one) for one in some] for some in (self.system, self.prompt, self.response)]
        return [*turns, self.columns]

    @classmethod
    def from_json(cls, values: list[Any]) -> Answer:
        """Return what `as_json` made a list of."""
        *turns, columns = values
        system, prompt, response = (tuple(Message(*one) for one in some) for some in turns)
        return cls(system, prompt, response, columns)


def paired_answers(row: Mapping[str, object], origin: str) -> Pair:
    """Make a pair of a row that `gather` made; its weight is the mean of both.

    Raises:
        BadRow: As `preference` does.
    """
    good, bad = (cast(Answer, row[name]) for name in ("good", "bad"))
    pair = preference(good.prompt + good.response, good.prompt + bad.response, origin)
    columns = dict(good.columns)
    if "weight" in (good.columns.keys() | bad.columns.keys()):
        both = (answer.columns.get("weight", 1.0) for answer in (good, bad))
        columns["weight"] = fields.number(sum(both) / 2, "weight")
    return dataclasses.replace(pair, prompt=good.system + pair.prompt, **columns)


def gather(rows: Iterator[Row], scratch: Path) -> Iterator[Row]:
    """Pair the rows of a source, each of them `{"prompt", "completion", "label"}`.

    Args:
        rows: All rows of the source.
        scratch: An empty folder, in which they wait.

    Yields:
        For the first row of a pair, a row of both answers: `{"good", "bad"}`, read at `good+bad`. A row that cannot
        be read, or has no counterpart, in its own turn.
    """
    with _Waiting(scratch / "rows.jsonl") as waiting:
        waiting.add(rows)
        for number, (partner, label) in enumerate(zip(waiting.partners(), waiting.labels, strict=True)):
            if label == _UNUSABLE:
                yield waiting.row(number)
            elif partner < 0:
                yield _alone(waiting.row(number), label)
            elif partner > number:
                good, bad = (number, partner) if label == _GOOD else (partner, number)
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
            key, label, line = _parsed(row)
            self._keys.append(key)
            self.labels.append(label)
            self._starts.append(self._file.tell())
            self._file.write(line.encode() + b"\n")

    def row(self, number: int) -> Row:
        """Read a row back: its answer, or its problem."""
        self._file.seek(self._starts[number])
        origin, answer, *problem = json.loads(self._file.readline())
        return Row(origin, answer and {"answer": Answer.from_json(answer)}, *problem)

    def partners(self) -> array[int]:
        """Return for each row the one it is paired with, −1 where there is none."""
        partners = array("q", [-1]) * len(self.labels)
        usable = (number for number, label in enumerate(self.labels) if label != _UNUSABLE)
        key = self._keys.__getitem__
        for _, same_prompt in itertools.groupby(sorted(usable, key=key), key):
            rows = list(same_prompt)
            good, bad = ([row for row in rows if self.labels[row] == label] for label in (_GOOD, _BAD))
            for one, other in zip(good, bad, strict=False):
                partners[one], partners[other] = other, one
        return partners


def _parsed(row: Row) -> tuple[int, int, str]:
    """Parse a row; return a digest of its prompt, its label, and its answer or its problem as JSON."""
    if row.values is None:
        return 0, _UNUSABLE, json.dumps([row.origin, None, row.problem, row.reason, row.structural])
    try:
        answer, label = _answer(row.values, row.system), _label(row.values)
    except BadRow as bad:
        return 0, _UNUSABLE, json.dumps([row.origin, None, bad.detail, bad.reason, bad.structural])
    return _prompt_key(answer), label, json.dumps([row.origin, answer.as_json()])


def _answer(values: Mapping[str, object], system: str) -> Answer:
    """Read and check everything but the label."""
    prompt = read_prompt(values)
    whole = after(prompt, read_turns(fields.field(values, "completion"), "completion"), "completion")
    check_end(whole, "completion")
    check_answers(whole, len(prompt), "completion")
    return Answer(read_system(values, whole, system), prompt, whole[len(prompt) :], read_columns(values))


def _prompt_key(answer: Answer) -> int:
    """Digest what the model is given before its answer."""
    turns = [(message.role, message.text, message.extras) for message in answer.system + answer.prompt]
    whole = _sorted_json([turns, answer.columns.get("arguments")])
    return int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=_KEY_BYTES).digest(), "little")


def _label(values: Mapping[str, object]) -> int:
    value = fields.field(values, "label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int)) and (label := _LABELS.get(str(value).strip().lower())) is not None:
        return label
    said = f"`{fields.printable(value)}`" if isinstance(value, (str, int, float)) else fields.kind(value)
    raise BadRow("wrong label", f"`label` is {said} instead of true or false, 1 or 0")


def _alone(row: Row, label: int) -> Row:
    """Return a row that found no counterpart."""
    other = "bad" if label == _GOOD else "good"
    problem = f"no {other} answer to its prompt is left for a pair"
    return Row(row.origin, None, problem, "no counterpart", structural=False)


def _paired(good: Row, bad: Row) -> Row:
    """Return the row of both answers."""
    assert good.values is not None and bad.values is not None
    values = {"good": good.values["answer"], "bad": bad.values["answer"]}
    return Row(f"{good.origin}+{bad.origin}", values, num_rows=2)
