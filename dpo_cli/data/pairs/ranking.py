"""Several answers to one prompt, and how good each of them is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

from dpo_cli.data.pairs.conversations import Messages, is_message, read_turns
from dpo_cli.data.records import BadRow, Message
from dpo_cli.data.rows import fields

RANKINGS = ("scores", "ranks")
"""The columns that say how good the answers are."""

_TEXT = ("text", "content", "response")


def read_response(value: object, place: str) -> Messages:
    """Read one of several answers: as `read_turns` does, or an object that holds its text."""
    if not isinstance(value, Mapping) or is_message(value):
        return read_turns(value, place)
    name = next((name for name in _TEXT if value.get(name) is not None), None)
    if name is None:
        raise BadRow("missing field", f"`{place}` has no `text`, `content` or `response`")
    return (Message("assistant", fields.text(value[name], f"{place}.{name}")),)


def read_scores(row: Mapping[str, object], count: int) -> list[float]:
    """Read how good each of some answers is, the best being the highest; of ranks the lowest is the best."""
    name = next((name for name in RANKINGS if row.get(name) is not None), RANKINGS[0])
    listed = fields.items(fields.field(row, name), name, "numbers")
    if len(listed) != count:
        raise BadRow("wrong length", f"`{name}` has {len(listed)} numbers for {count} responses")
    for number, value in enumerate(listed):
        fields.number(value, f"{name}[{number}]")
    sign = 1.0 if name == "scores" else -1.0
    # Their difference is what is kept with 32 bits, not they.
    found = [sign * float(cast("float", value)) for value in listed]
    if name == "scores" and row.get("ranks") is not None:
        _check_order(found, read_scores({"ranks": row["ranks"]}, count))
    return found


def _check_order(scores: Sequence[float], by_rank: Sequence[float]) -> None:
    """Refuse scores and ranks of which each calls another answer the better one."""
    for one, other in itertools.combinations(range(len(scores)), 2):
        if (scores[one] - scores[other]) * (by_rank[one] - by_rank[other]) < 0:
            better = (one, other) if scores[one] > scores[other] else (other, one)
            said = "`scores` say that `responses[{}]` is better than `responses[{}]`, and `ranks` the opposite"
            raise BadRow("scores against ranks", said.format(*better))
