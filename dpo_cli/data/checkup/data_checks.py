"""What is looked for in the data as a whole; `DATA_CHECKS` at the end lists it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.checkup.comparisons import Found, Indices
from dpo_cli.data.checkup.endings import closing_token, way_out, without_end
from dpo_cli.data.checkup.excerpts import Excerpts
from dpo_cli.data.checkup.measures import Statistics
from dpo_cli.data.checkup.report import EXAMPLES, Example, LengthBias
from dpo_cli.data.findings import Check
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.system.text import several

_FAIR = 0.4, 0.6
"""How often the longer response may be the chosen one before the lengths are a finding."""


@dataclass(frozen=True)
class Examined:
    """The data of a run.

    Attributes:
        pairs: All pairs.
        indices: Those of the run, each counted once, ascending.
        read: What was found while rows were read, by setting.
        max_length: The length rule's, in tokens.
        bias: What the lengths of the responses give away.
        excerpts: Reads out examples.
        tokenizer: Names tokens; None: there is none.
        ends: The tokens at which generation ends; None: that is not looked at.
    """

    pairs: PreparedPairs
    indices: Indices
    read: Mapping[str, Statistics]
    max_length: int
    bias: LengthBias
    excerpts: Excerpts
    tokenizer: Any
    ends: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class Counted:
    """How often something was found.

    Attributes:
        check: What was looked for; it may say more than it does in general.
        count: How often it was found.
        total: Among how many.
        examples: The first ones.
    """

    check: Check
    count: int
    total: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck(Check):
    """Something to look for in the data as a whole.

    Attributes:
        count: Looks for it, given the check; None: there is nothing to look at.
    """

    count: Callable[[DataCheck, Examined], Counted | None]


def _unlike_ends(check: DataCheck, data: Examined) -> Counted:
    """Return the pairs of which the responses end with different tokens."""
    unlike = (data.pairs.tails("chosen", 1) != data.pairs.tails("rejected", 1))[data.indices, 0]
    examples = data.excerpts.examples(Found(data.indices[unlike]))
    return Counted(check, int(unlike.sum()), len(data.indices), examples)


def _no_end(check: DataCheck, data: Examined) -> Counted | None:
    """Return the pairs of which a response does not end as generation does, with both tokens."""
    pairs, tokenizer, ends = data.pairs, data.tokenizer, data.ends
    if not tokenizer or ends is None:
        return None
    lacking = without_end(pairs, ends)
    found, said = Found(data.indices[lacking[data.indices]]), check
    if lacking.any() and (closing := closing_token(pairs, lacking, tokenizer)):
        named = ", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
        meaning = (
            f"The template ends responses with `{closing}`, but generation ends at {named or 'no token'}: the trained "
            "model would not stop."
        )
        advice = way_out(closing, tokenizer)
        said = dataclasses.replace(check, meaning=meaning, advice=f"{advice[0].upper()}{advice[1:]}.")
    return Counted(said, len(found.indices), len(data.indices), data.excerpts.examples(found))


def _dropped_rows(check: DataCheck, data: Examined) -> Counted:
    """Return the rows that did not become pairs, with the reasons and what to do about each."""
    reasons: Counter[str] = Counter()
    for part in data.read.values():
        reasons.update(part["dropped"])
    named = reasons.most_common()
    listed = ", ".join(f"{count:,} {reason}" for reason, count in named)
    advice = dict.fromkeys(_ADVICE.get(reason, check.advice).format(data.max_length) for reason, _ in named)
    # A row of a ranked list may be dropped as several pairs.
    total = max(reasons.total(), sum(part["rows_read"] for part in data.read.values()))
    why = f"as {named[0][0]}" if len(named) == 1 else f"({listed})"
    said = dataclasses.replace(
        check,
        title=f"of {several(total, 'row')} ({_percent(reasons.total() / total)}) were dropped {why}",
        meaning=f"Rows did not become pairs: {listed}.",
        advice=" ".join(advice),
    )
    return Counted(said, reasons.total(), total, _dropped_examples(data.read, [reason for reason, _ in named]))


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


def _length_bias(check: DataCheck, data: Examined) -> Counted:
    """Return how many pairs the lengths give away, if they do."""
    low, high = data.bias.interval
    count = data.bias.longer if low > _FAIR[1] else data.bias.shorter if high < _FAIR[0] else 0
    return Counted(check, count, len(data.indices), ())


_ADVICE = {
    "too long": "Raise `data.max_length` ({}) or set `data.on_too_long: truncate`.",
    "response too long": "Raise `data.max_length` ({}) or set a lower `data.min_response`.",
    "empty turn": "Set `model.chat_template` to a template that writes what the turns say or call.",
    "template error": "Fix the template, or set `model.chat_template` to another one.",
    "identical responses": "Remove pairs that teach nothing from the data.",
}
"""What to do about rows that were dropped for a reason, given `data.max_length`; about others: fix them."""

DATA_CHECKS = (
    DataCheck(
        "unlike_ends",
        "warning",
        "chosen and rejected end with different tokens",
        "The chosen response ends with another token than the rejected one: the last token alone distinguishes them.",
        "Use a template that ends all responses in the same way, and do not truncate responses.",
        when="chosen and rejected end with different tokens",
        count=_unlike_ends,
    ),
    DataCheck(
        "no_end_token",
        "warning",
        "responses do not end with a token that stops generation",
        "Responses do not end with a token that stops generation: the trained model would not stop.",
        "Use a chat template that closes the assistant's turn with the end-of-sequence token.",
        when=(
            "a response that was not truncated does not end with a token that stops generation: the tokenizer's "
            "end-of-sequence token, or one of `eos_token_id` in the model's generation_config.json. The finding "
            "names the token that the template writes at the end of responses, and the value of `model.eos_token` "
            "that fixes it"
        ),
        count=_no_end,
    ),
    DataCheck(
        "dropped_rows",
        "warning",
        "rows did not become pairs",
        "Rows did not become pairs.",
        "Fix the rows.",
        when=(
            "rows were dropped while the data was read, by `data.on_bad_row`, by the length rule, or because both "
            "responses are the same. The share is that of all rows read; the finding names the reasons and a remedy"
            " for each"
        ),
        count=_dropped_rows,
    ),
    DataCheck(
        "length_bias",
        "warning",
        "the length of a response reveals which one is chosen",
        "The length of a response reveals which one is chosen: a model may learn length before anything else.",
        "Balance the lengths, or choose a loss that takes them into account: `r_dpo`, `ld_dpo`, `simpo`.",
        when=(
            "the 95 % interval of how often the longer response is the chosen one (ties count half) is above 60 % "
            "or below 40 %"
        ),
        count=_length_bias,
    ),
)
"""All that is looked for."""
