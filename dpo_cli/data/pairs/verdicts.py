"""Two answers side by side, and a verdict which of them is better."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dpo_cli.data.records import BadRow
from dpo_cli.data.rows import fields

TWO = (("response_a", "response_b"), ("response_1", "response_2"), ("response_0", "response_1"))
"""The columns of two answers; their ends are what a verdict may call them."""

VERDICTS = ("winner", "label")
"""The columns that say which answer is better: by its name, or by whether the first is."""

_TIES = frozenset({"tie", "tied", "both", "bothbad", "neither", "equal", "same", "draw", "even"})
_FILLERS = frozenset(
    {
        "model", "response", "answer", "assistant", "completion", "conversation", "output", "option", "reply", "human",
        "ref", "candidate", "system", "summary", "text", "is", "better", "wins", "winner",
    }
)  # fmt: skip
"""The words that a verdict may have beside the answer's own: `model_a`, `Response 1`."""

_YES_NO = {"true": True, "false": False}


def two_answers(row: Mapping[str, object]) -> tuple[str, str]:
    """Return the two columns of which most are there."""
    return max(TWO, key=lambda two: sum(row.get(name) is not None for name in two))


def better_and_worse(row: Mapping[str, object]) -> tuple[str, str]:
    """Return the columns of the better answer and of the worse one.

    Raises:
        BadRow: The verdict is a tie, missing, or names neither, or is against the scores; or an answer is missing.
    """
    two = two_answers(row)
    for name in two:
        fields.field(row, name)
    name = next((name for name in VERDICTS if row.get(name) is not None), VERDICTS[0])
    value = fields.field(row, name)
    first = _by_model(value, row, two)
    if first is None:
        first = _first_is_better(value, name, two)
    if first is None:
        said = fields.printable(value) if isinstance(value, (str, int, float)) else fields.kind(value)
        what = f"`{name}` is `{said}`, which names neither `{two[0]}` nor `{two[1]}`"
        raise BadRow("wrong label", what + _other_names(value, two))
    better, worse = two if first else (two[1], two[0])
    _check_scores(row, better, worse, name)
    return better, worse


def as_chosen(row: Mapping[str, object], better: str, worse: str) -> dict[str, object]:
    """Return the columns of a row with two of them as its chosen and its rejected answer."""
    kept = {name: value for name, value in row.items() if name not in (better, worse)}
    return kept | {"chosen": row.get(better), "rejected": row.get(worse)}


def _check_scores(row: Mapping[str, object], better: str, worse: str, verdict: str) -> None:
    """Refuse a verdict that is against the scores of both answers, `score_a` and `score_b`, where a row has them."""
    scores = {name.lower(): value for name, value in row.items() if name.lower().startswith("score_")}
    names = [f"score_{column.rpartition('_')[2]}" for column in (better, worse)]
    high, low = (scores.get(name) for name in names)
    if isinstance(high, (int, float)) and isinstance(low, (int, float)) and high < low:
        said = f"`{verdict}` says that `{better}` is better, and `{names[0]}` is lower than `{names[1]}`"
        raise BadRow("scores against ranks", said)


def _by_model(value: object, row: Mapping[str, object], two: tuple[str, str]) -> bool | None:
    """Tell whether a verdict is the name of the first answer's model; None where it is not that of one of both."""
    models = [row.get(f"model_{column.rpartition('_')[2]}") for column in two]
    if not isinstance(value, str) or models[0] == models[1] or value not in models:
        return None
    return value == models[0]


def _first_is_better(value: object, name: str, two: tuple[str, str]) -> bool | None:
    """Tell whether the first of two answers is the better one; None where the verdict does not say."""
    if not isinstance(value, (str, int, float)):
        return None
    words = re.findall(r"[a-z]+|-?\d+(?:\.\d+)?", str(value).lower())
    if not _TIES.isdisjoint(words) or words == ["0.5"]:
        raise BadRow("no preference", f"`{name}` is a tie", structural=False)
    ends = [column.rpartition("_")[2] for column in two]
    if len(words) == 1 and name == "label" and (words[0] in _YES_NO or ends == ["a", "b"]):
        said = _YES_NO.get(words[0], {"1": True, "0": False, "1.0": True, "0.0": False}.get(words[0]))
        if said is not None:
            return said
    words = [word.removesuffix(".0") for word in words]
    named = [end for end in (*ends, "first", "second") if words.count(end) == 1]
    if len(named) != 1 or not {*words} <= {*named, *_FILLERS}:
        return None
    return named[0] in (ends[0], "first")


def _other_names(value: object, two: tuple[str, str]) -> str:
    """Say how a number can be made to name one of two answers that have letters."""
    if two != TWO[0] or not re.fullmatch(r"\s*[0-2](\.0)?\s*", str(value)):
        return ""
    return "; use `data.columns` to call them `response_0` and `response_1`, or `response_1` and `response_2`"
