"""The check of a run's data: everything that is found in the prepared pairs and their split, as a report.

Nothing is tokenized here. Pairs are looked at by columns: their digests, their lengths, and what was noticed of
their texts while they were prepared.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dpo_cli.data.checkup.comparison import COMPARED, Found, Indices, find, without_copies
from dpo_cli.data.checkup.endings import closing_token, way_out, without_end
from dpo_cli.data.checkup.excerpts import Excerpts
from dpo_cli.data.checkup.measures import Statistics, boundary, length_bias, lengths, margins
from dpo_cli.data.checkup.report import EXAMPLES, Example, Finding, LengthBias, Report
from dpo_cli.data.findings import Kind
from dpo_cli.data.pairs.inspection import NOTICED
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.tokens.unwritten import NOT_JSON, UNWRITTEN

_FAIR = 0.4, 0.6
"""How often the longer response may be the chosen one before the lengths are a finding."""

_GRAVE_FIRST = ("error", "warning", "info").index

OF_TOKENS = (
    Kind(
        "prompt_differs",
        "warning",
        "inference sends another prompt than the template writes",
        "The prompt that inference sends is not how the template writes the answered conversation (it opens a "
        "thought, say): the boundary was put where the two part.",
        "Use a template that writes an answered conversation as it asks for an answer; `data.turns: last` changes "
        "nothing here.",
    ),
    Kind(
        "context_differs",
        "warning",
        "inference sends other earlier turns than the template writes",
        "Within a response of several turns the template writes earlier turns otherwise than inference would send "
        "them.",
        "Use a template that leaves earlier turns as they are, or set `data.turns: last`.",
    ),
    *UNWRITTEN.values(),
    NOT_JSON,
    Kind(
        "control_tokens_as_text",
        "warning",
        "a text spells out a control token",
        "A text holds what is a control token of the template; it was encoded as text.",
        "Check whether a template wrote the data before; if so, take it apart into messages.",
    ),
    Kind(
        "responses_cut",
        "warning",
        "a response was cut to fit `data.max_length`",
        "A response was cut to fit `data.max_length`: the model does not see how it ends.",
        "Raise `data.max_length`, or set `data.on_too_long: drop`.",
    ),
    Kind(
        "rewritten",
        "info",
        "the template strips or rewrites what the assistant says",
        "What the assistant says does not stand in the template's text as the data has it: the template strips or "
        "rewrites it (thoughts, for instance).",
        "Look at a few; where something is missed, use a template that keeps it.",
    ),
    Kind(
        "truncated",
        "info",
        "a prompt was cut to fit `data.max_length`",
        "The beginning of a prompt was cut to fit `data.max_length`.",
        "Nothing to do where the end of a prompt says enough; else raise `data.max_length`.",
    ),
    Kind(
        "joined_at_boundary",
        "info",
        "prompt and response were tokenized apart",
        "The tokenizer would have merged the end of the prompt with the beginning of the response; they were "
        "tokenized apart, so that the response begins with a token of its own.",
        "Nothing to do.",
    ),
)
"""What came to light when pairs were tokenized, called as in `FLAGS`."""

DROPPED_ROWS = Kind(
    "dropped_rows",
    "warning",
    "rows did not become pairs",
    "Rows did not become pairs.",
    "Fix the rows.",
)

_ADVICE = {
    "too long": "Raise `data.max_length` ({}) or set `data.on_too_long: truncate`.",
    "response too long": "Raise `data.max_length` ({}) or set a lower `data.min_response`.",
    "empty turn": "Set `model.chat_template` to a template that writes what the turns say or call.",
    "template error": "Fix the template, or set `model.chat_template` to another one.",
    "identical responses": "Take pairs that teach nothing out of the data.",
}
"""What to do about rows that were dropped for a reason, given `data.max_length`; about others: fix them."""

LENGTH_BIAS = Kind(
    "length_bias",
    "warning",
    "the length of a response tells which one is chosen",
    "The length of a response tells which one is chosen: a model may learn length before anything else.",
    "Balance the lengths, or choose a loss that takes them into account: `r_dpo`, `ld_dpo`, `simpo`.",
)

NO_END = Kind(
    "no_end_token",
    "warning",
    "responses do not end where generation ends",
    "Responses do not end with a token at which generation ends: the trained model would not stop.",
    "Use a chat template that closes the assistant's turn with the end-of-sequence token.",
)

UNLIKE_ENDS = Kind(
    "unlike_ends",
    "warning",
    "chosen and rejected end with different tokens",
    "The chosen response ends with another token than the rejected one: the last token alone tells them apart.",
    "Use a template that closes every response alike, and do not cut responses.",
)


def examine(
    pairs: PreparedPairs,
    train: Indices,
    held_out: Indices,
    *,
    max_length: int,
    read: Mapping[str, Statistics] | None = None,
    left_out: Mapping[str, int] | None = None,
    uses_margins: bool = False,
    tokenizer: Any = None,
    ends: frozenset[int] | None = None,
) -> Report:
    """Report on the data of a run.

    Args:
        pairs: All pairs.
        train: Those that are trained on.
        held_out: Those that are held out.
        max_length: The length rule's, in tokens.
        read: What was found while rows were read, by setting; None: what the manifest of the pairs says.
        left_out: How many pairs were left out before, by the finding they were left out for.
        uses_margins: Whether the loss uses the margins in the data.
        tokenizer: Reads excerpts out; without one there are none.
        ends: The tokens at which generation ends; None: that is not looked at.
    """
    read = read or {"data.train": pairs.manifest["statistics"]}
    trials = [without_copies(pairs, side) for side in (train, held_out)]
    indices = np.sort(np.concatenate(trials))
    bias = length_bias(pairs, indices)
    looked_for = [
        *_of_pairs(pairs, train, held_out, indices, Excerpts(pairs, tokenizer)),
        *([_of_ends(pairs, indices, tokenizer, ends)] if tokenizer and ends is not None else []),
        _of_rows(read, max_length),
        (LENGTH_BIAS, *_biased(bias, len(indices)), ()),
    ]
    findings = [_finding(*one) for one in looked_for if one[1]]
    return Report(
        read=read,
        num_train=len(train),
        num_held_out=len(held_out),
        num_copies=len(train) - len(trials[0]),
        left_out=left_out or {},
        findings=tuple(sorted(findings, key=lambda finding: _GRAVE_FIRST(finding.severity))),
        not_found=tuple(kind.name for kind, count, *_ in looked_for if not count),
        length_bias=bias,
        lengths=lengths(pairs, indices, read.values(), max_length),
        margins=margins(pairs, indices, used=uses_margins),
        boundary=boundary(pairs, indices, tokenizer) if tokenizer else None,
    )


_Counted = tuple[Kind, int, int, tuple[Example, ...]]
"""A kind of finding, how often it was found, among how many, and examples."""


def _finding(kind: Kind, count: int, total: int, examples: tuple[Example, ...]) -> Finding:
    about = kind.title, kind.meaning, kind.advice, kind.heuristic
    return Finding(kind.name, kind.severity, count, count / total, *about, examples)


def _of_pairs(
    pairs: PreparedPairs, train: Indices, held_out: Indices, counted: Indices, excerpts: Excerpts
) -> Iterator[_Counted]:
    """Yield what shows in the pairs, by themselves and beside each other; those that are no copies count."""
    places = {notice.kind.name: notice.place for notice in NOTICED}
    for kind in (*(one.kind for one in (*COMPARED, *NOTICED)), *OF_TOKENS):
        found = find(kind.name, pairs, train, held_out).among(counted)
        yield kind, len(found.indices), len(counted), excerpts.examples(found, places.get(kind.name))
    unlike = (pairs.tails("chosen", 1) != pairs.tails("rejected", 1))[counted, 0]
    yield UNLIKE_ENDS, int(unlike.sum()), len(counted), excerpts.examples(Found(counted[unlike]))


def _of_ends(pairs: PreparedPairs, counted: Indices, tokenizer: Any, ends: frozenset[int]) -> _Counted:
    """Return the pairs of which a response does not end as generation does, with both tokens."""
    lacking = without_end(pairs, ends)
    found, kind = Found(counted[lacking[counted]]), NO_END
    if lacking.any() and (closing := closing_token(pairs, lacking, tokenizer)):
        named = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
        meaning = (
            f"The template ends responses with `{closing}`, and generation ends at {named or 'no token'}: the trained "
            "model would not stop."
        )
        advice = way_out(closing, tokenizer)
        kind = dataclasses.replace(NO_END, meaning=meaning, advice=f"{advice[0].upper()}{advice[1:]}.")
    return kind, len(found.indices), len(counted), Excerpts(pairs, tokenizer).examples(found)


def _of_rows(read: Mapping[str, Statistics], max_length: int) -> _Counted:
    """Return the rows that did not become pairs, with the reasons and what to do about each."""
    reasons: Counter[str] = Counter()
    for part in read.values():
        reasons.update(part["dropped"])
    named = reasons.most_common()
    listed = ", ".join(f"{count:,} {reason}" for reason, count in named)
    advice = dict.fromkeys(_ADVICE.get(reason, DROPPED_ROWS.advice).format(max_length) for reason, _ in named)
    # A row of a ranked list may be dropped as several pairs.
    total = max(reasons.total(), sum(part["rows_read"] for part in read.values()))
    why = f"as {named[0][0]}" if len(named) == 1 else f"({listed})"
    kind = dataclasses.replace(
        DROPPED_ROWS,
        title=f"of {total:,} rows ({_percent(reasons.total() / total)}) were dropped {why}",
        meaning=f"Rows did not become pairs: {listed}.",
        advice=" ".join(advice),
    )
    return kind, reasons.total(), total, _dropped_examples(read, [reason for reason, _ in named])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def _dropped_examples(read: Mapping[str, Statistics], reasons: list[str]) -> tuple[Example, ...]:
    """Return a few dropped rows, of as many reasons as can be."""
    by_reason = [
        [(reason, line) for part in read.values() for line in part["examples"].get(reason, ())] for reason in reasons
    ]
    in_turn = (one for rank in itertools.zip_longest(*by_reason) for one in rank if one is not None)
    examples = []
    for reason, line in itertools.islice(in_turn, EXAMPLES):
        origin, _, detail = line.partition(": ")
        examples.append(Example(origin, "", {"dropped": f"{reason}: {detail}" if len(reasons) > 1 else detail}))
    return tuple(examples)


def _biased(bias: LengthBias, total: int) -> tuple[int, int]:
    """Return how many pairs the lengths give away, if they do, and of how many."""
    low, high = bias.interval
    if low > _FAIR[1]:
        return bias.longer, total
    return bias.shorter if high < _FAIR[0] else 0, total
