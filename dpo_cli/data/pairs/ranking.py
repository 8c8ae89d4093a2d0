"""Several answers to one prompt, how good each of them is, and the pairs that they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import cast

from dpo_cli.data.pairs.conversations import after, preference
from dpo_cli.data.pairs.messages import Messages, is_message, read_turns
from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.rows import fields
from dpo_cli.system.text import several

RANKINGS = ("scores", "ranks")
"""The columns that say how good the answers are."""

_TEXT = ("text", "content", "response")


def read_response(value: object, prompt: Messages, place: str) -> Messages:
    """Read one of several answers, the prompt before it: as `read_turns` does, or an object that holds its text."""
    if not isinstance(value, Mapping) or is_message(value):
        return after(prompt, read_turns(value, place), place)
    name = next((name for name in _TEXT if value.get(name) is not None), None)
    if name is None:
        raise BadRow("missing field", f"`{place}` has no `text`, `content` or `response`")
    answer = Message("assistant", fields.text(value[name], f"{place}.{name}"))
    return after(prompt, (answer,), place)


def read_scores(row: Mapping[str, object], count: int) -> list[float]:
    """Read how good each of some answers is, the best being the highest; of ranks the lowest is the best."""
    name = next((name for name in RANKINGS if row.get(name) is not None), RANKINGS[0])
    listed = fields.items(fields.field(row, name), name, "numbers")
    if len(listed) != count:
        raise BadRow("wrong length", f"`{name}` has {several(len(listed), 'number')} for {several(count, 'response')}")
    for number, value in enumerate(listed):
        fields.number(value, f"{name}[{number}]")
    sign = 1.0 if name == "scores" else -1.0
    # Their difference is what is kept with 32 bits, not they.
    found = [sign * float(cast("float", value)) for value in listed]
    if name == "scores" and row.get("ranks") is not None:
        _check_order(found, read_scores({"ranks": row["ranks"]}, count))
    return found


def ranked_pairs(
    answers: Sequence[Messages], scores: Sequence[float], best_first: Sequence[int], origin: str
) -> list[Pair]:
    """Make a pair of every two answers whose scores differ, the difference its margin.

    A pair of which an answer is empty, or both are the same, is left out.

    Args:
        answers: The answers, each with the prompt before it.
        scores: How good each of them is.
        best_first: The numbers of those that are compared, the best first.
        origin: Where they were read.

    Raises:
        BadRow: An answer is broken, or no pair is left.
    """
    pairs, refusals = [], []
    for better, worse in itertools.combinations(best_first, 2):
        if scores[better] <= scores[worse]:
            continue
        places = f"responses[{better}]", f"responses[{worse}]"
        try:
            pair = preference(answers[better], answers[worse], origin, places)
        except BadRow as bad:
            if bad.structural:
                raise
            refusals.append(bad)
        else:
            margin = fields.number(scores[better] - scores[worse], "difference of scores")
            pairs.append(dataclasses.replace(pair, margin=margin))
    if not pairs:
        raise refusals[0]
    return pairs


def _check_order(scores: Sequence[float], by_rank: Sequence[float]) -> None:
    """Refuse scores and ranks of which each calls another answer the better one."""
    for one, other in itertools.combinations(range(len(scores)), 2):
        if (scores[one] - scores[other]) * (by_rank[one] - by_rank[other]) < 0:
            better = (one, other) if scores[one] > scores[other] else (other, one)
            detail = "`scores` say that `responses[{}]` is better than `responses[{}]`, and `ranks` the opposite"
            raise BadRow("scores against ranks", detail.format(*better))
