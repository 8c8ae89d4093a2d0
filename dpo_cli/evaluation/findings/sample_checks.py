"""What is looked for in the answers to held-out prompts; `SAMPLE_CHECKS` at the end lists it."""

from __future__ import annotations

import math
import statistics
import zlib

from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.history import History, Row, changes, mean_of
from dpo_cli.evaluation.findings.remedies import FEWER_STEPS, LENGTH_LOSS, LOWER_RATE, RAISE_BETA, plain
from dpo_cli.system.text import several

_REPEATED = 2.4
"""How much shorter zlib may make an answer: Whisper takes what shrinks more for a model that repeats itself.

Source: Radford et al. 2022, arXiv 2212.04356, section 4.5, where it is gzip.
"""

_END_CHARACTERS = 1000
"""Characters at the end of an answer that are looked at: long texts shrink more, whatever they say."""

_LOOP_CHARACTERS = 10
"""Characters of the shortest stretch that is looked for three times in a row: of fewer, it is no text yet."""

_DRIFT = math.log(1.5)
"""Log of the factor by which lengths may drift away from those of the chosen responses."""

_SURE = 2.5
"""Standard errors by which the drift of several answers is not chance."""


def _nonsense(history: History) -> str:
    """Find half of the answers before step 1 empty, or repeating themselves."""
    rows = history.samples.get(0, []) if not history.step else []
    empty = sum(not str(row.get("answer", "")).strip() for row in rows)
    repeating = sum(_repeats(row) or _loops(row) for row in rows)
    if not rows or empty + repeating < len(rows) / 2:
        return ""
    kinds = {"empty": empty, "without an end, or repeating themselves": repeating}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"of {several(len(rows), 'answer')}, {counts}"


def _loops(row: Row) -> bool:
    """Tell whether an answer was cut at the limit while it said the same for the third time."""
    end = str(row.get("answer", ""))[-_END_CHARACTERS:]
    sizes = range(_LOOP_CHARACTERS, len(end) // 3 + 1) if row.get("ended") is False else ()
    return any(end[-3 * size : -size] == end[-2 * size :] for size in sizes)


def _repetition(history: History) -> str:
    """Find more answers that repeat themselves than before step 1: a quarter of them, and 2 where there are as many."""
    pairs = _since_beginning(history)
    before, after = (sum(_repeats(row) for row in rows) for rows in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not pairs or after - before < min(len(pairs), max(2, math.ceil(len(pairs) / 4))):
        return ""
    return f"{after} of {several(len(pairs), 'answer')}, {before} before step 1"


def _repeats(row: Row) -> bool:
    text = str(row.get("answer", ""))[-_END_CHARACTERS:].encode()
    return len(text) > _REPEATED * len(zlib.compress(text))


def _lengths_drift(history: History) -> str:
    """Find answers that moved away from the lengths of chosen responses by a factor of 1.5, most of them alike."""
    pairs = [pair for pair in _since_beginning(history) if all(row.get("chosen_tokens") for row in pair)]
    if len(pairs) < 3:
        return ""
    moves = [_log_length(after) - _log_length(before) for before, after in pairs]
    away = statistics.fmean(_log_length(after) - math.log(after["chosen_tokens"]) for _, after in pairs)
    moved, error = statistics.fmean(moves), statistics.stdev(moves) / math.sqrt(len(moves))
    if abs(away) < _DRIFT or abs(moved) < max(_DRIFT, _SURE * error) or moved * away < 0:
        return ""
    befores, afters = zip(*pairs, strict=True)
    before, after, chosen = mean_of(befores, "tokens"), mean_of(afters, "tokens"), mean_of(afters, "chosen_tokens")
    now = several(round(after or 0), "token")
    return f"{now} on average after {before:.0f} before step 1; chosen responses have {chosen:.0f}"


def _log_length(row: Row) -> float:
    return math.log(max(1, row.get("tokens", 1)))


def _since_beginning(history: History) -> list[tuple[Row, Row]]:
    """Return each prompt's answer before step 1 and the one of this step, if there are any."""
    if not history.step or history.step not in history.samples:
        return []
    return changes(history.samples.get(0, []), history.samples.get(history.step, []), "where")


NONSENSE = RunCheck(
    name="nonsense_before",
    severity="warning",
    title="the model writes nonsense before training",
    meaning=(
        "Training begins with a model that does not answer such prompts, so that answers say nothing about the "
        "training: preferences between answers that a model never gives teach it little."
    ),
    remedies=(
        plain("begin with a model that was tuned to follow instructions"),
        plain("train it on the chosen responses first (loss `sft`)"),
        plain("check that `model.chat_template` is the template that the model was trained with"),
    ),
    when=(
        "half of the answers before step 1 have no text, are made shorter by zlib as in `repetition`, or were cut at "
        "the limit of tokens while they said the same for the third time in a row. An answer that is long alone is "
        "not counted: it may make sense"
    ),
    look=_nonsense,
)
"""What is looked for before step 1: where it is found, answers say nothing about the training."""

SAMPLE_CHECKS = (
    NONSENSE,
    RunCheck(
        name="repetition",
        severity="error",
        title="the model's answers repeat themselves",
        meaning="The policy has moved so far from its reference that it loses what it knew of language.",
        remedies=(LOWER_RATE, RAISE_BETA, FEWER_STEPS),
        when=(
            "zlib makes the last 1,000 characters of an answer shorter by a factor above 2.4, the limit by which "
            "Whisper rejects what repeats itself; of a quarter of the answers more than before step 1, 2 at least"
        ),
        look=_repetition,
    ),
    RunCheck(
        name="lengths_drift",
        severity="warning",
        title="answers drift away from the length of the chosen responses",
        meaning="Length is what is learned first: a sum over tokens rewards it, whatever the answer says.",
        remedies=(
            LENGTH_LOSS,
            RAISE_BETA,
            plain("balance the lengths of both responses"),
        ),
        when=(
            "of 3 answers or more, the lengths are off those of the chosen responses by a factor of 1.5 (geometric "
            "mean), and moved that far in this direction since before step 1, by 2.5 standard errors: single answers "
            "vary as much"
        ),
        look=_lengths_drift,
    ),
)
"""All that is looked for, the gravest first."""
