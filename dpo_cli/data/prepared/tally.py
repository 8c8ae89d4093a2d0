"""What is found while rows are read: counts by reason, a few examples of each, how often each length occurs.

A tally has the same size after a thousand rows and after a million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_cli.data.records import BadRow, total_tokens
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS
from dpo_cli.data.tokens.tokenize import Tokenized
from dpo_cli.errors import UserError, raise_all
from dpo_cli.system.text import several

_EXAMPLES = 3
COUNTED: dict[str, Callable[[Tokenized], bool]] = {
    **{check.name: check.holds for check in TOKEN_CHECKS},
    "weighted": lambda result: result.pair.weight != 1,
    "with_margin": lambda result: result.pair.margin != 0,
}
"""What is counted of the pairs that are kept, under the name that the manifest has for it."""

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""The quantiles of lengths that the manifest has, beside their mean."""


MEASURED = ("prompt", "chosen", "rejected", "longest")
"""Whose tokens are counted of pairs that were dropped as too long; the longest is prompt and longer response."""


_FIX, _UTF_8 = "fix the row", "save the file as UTF-8"
_ADVICE = {
    "too long": "raise `data.max_length`, or set `data.on_too_long: truncate`",
    "response too long": "raise `data.max_length`, or set `data.min_response` to let responses be truncated",
    "template error": "fix the template, or set `model.chat_template` to another one",
    "empty turn": "set `model.chat_template` to a template that writes it, or fix the row",
    "missing field": "fix the row, map the column with `data.columns`, or set another shape in `data.format`",
    "wrong type": "fix the row, or set another shape in `data.format`",
    "wrong role": "fix the row, or call the speaker system, user, assistant or tool",
    "identical responses": "check that `chosen` and `rejected` are read from two columns (`data.columns`)",
    "empty response": "check that `chosen` and `rejected` are read from the right columns (`data.columns`)",
    "no counterpart": "check that each prompt has answers of both labels, and that prompts are spelled the same way",
    "no preference": "check that the scores differ, and are read from the right column (`data.columns`)",
    "different contexts": "check that both conversations of a row begin in the same way",
    "two system prompts": "leave out the column `system`, or the system's turn in the conversation",
}
"""What to do about rows of which no pair can be made, by the reason."""


@dataclass
class Tally:
    """What was found in some rows.

    Attributes:
        num_read: The rows.
        num_kept: Those that became pairs.
        counts: Pairs with something particular about them: a number for each of `COUNTED`.
        broken: Rows that stop the reading, where structural errors do.
        dropped: Rows that did not become pairs, by reason.
        examples: The first of them, by reason.
        broken_examples: The first broken ones, as they are reported.
        lengths: How many pairs have how many tokens, by column.
        too_long: The same of the pairs that were dropped as too long, and of their longer sequences.
    """

    num_read: int = 0
    num_kept: int = 0
    broken: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    broken_examples: list[UserError] = field(default_factory=list)
    lengths: dict[str, Counter[int]] = field(
        default_factory=lambda: {"prompt": Counter(), "chosen": Counter(), "rejected": Counter()}
    )
    too_long: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in MEASURED})

    def drop(self, origin: str, bad: BadRow, *, copy: bool = False) -> None:
        """Count a row that does not become a pair; of copies of a row the first one's lengths count."""
        if bad.lengths and not copy:
            for name, length in zip(MEASURED, (*bad.lengths, total_tokens(bad.lengths)), strict=True):
                self.too_long[name][length] += 1
        self.dropped[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(f"{origin}: {bad.detail}")
        if bad.structural:
            self.broken += 1
            if len(self.broken_examples) < _EXAMPLES:
                self.broken_examples.append(UserError(bad.detail, origin, _how_to_fix(bad)))

    def keep(self, result: Tokenized) -> None:
        """Count a pair that was kept."""
        self.num_kept += 1
        for name, holds in COUNTED.items():
            self.counts[name] += holds(result)
        for name, lengths in self.lengths.items():
            lengths[len(getattr(result.pair, name))] += 1

    def add(self, later: Tally) -> None:
        """Take in what was found in the rows that follow."""
        self.num_read += later.num_read
        self.num_kept += later.num_kept
        self.counts.update(later.counts)
        self.broken += later.broken
        self.dropped.update(later.dropped)
        for reason, examples in later.examples.items():
            shown = self.examples.setdefault(reason, [])
            shown += examples[: _EXAMPLES - len(shown)]
        self.broken_examples += later.broken_examples[: _EXAMPLES - len(self.broken_examples)]
        for name, lengths in later.lengths.items():
            self.lengths[name].update(lengths)
        for name, lengths in later.too_long.items():
            self.too_long[name].update(lengths)

    def judge(self, on_bad_row: str, where: str) -> None:
        """Stop where the data is broken, or nothing is left of it."""
        if self.broken and on_bad_row == "error":
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
            summary = f"{self.broken:,} of {several(self.num_read, 'row')} cannot be used (found: {counts})"
            first = f"the first {len(self.broken_examples)} are named above" if self.broken > _EXAMPLES else None
            raise_all([*self.broken_examples, UserError(summary, where, first)])
        if not self.num_kept:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
            (reason, _), *_ = self.dropped.most_common(1)
            example = self.examples[reason][0]
            hint = f"{_UTF_8 if 'not UTF-8' in example else _ADVICE.get(reason, _FIX)}; the first: {example}"
            raise UserError(f"none of {several(self.num_read, 'row')} is left: {counts}", where, hint)

    def statistics(self) -> dict[str, Any]:
        """Return what the manifest says of the reading."""
        return {
            "rows_read": self.num_read,
            "pairs_kept": self.num_kept,
            "dropped": dict(self.dropped.most_common()),
            "examples": self.examples,
            **{name: self.counts[name] for name in COUNTED},
            "tokens": {name: _quantiles(lengths) for name, lengths in self.lengths.items()},
            "too_long": {name: sorted(map(list, lengths.items())) for name, lengths in self.too_long.items()},
        }


def _how_to_fix(bad: BadRow) -> str:
    """Say what to do about a row that stops the reading."""
    drop = "set `data.on_bad_row: drop` to drop and count such rows"
    if bad.reason == "too long":
        return "raise `data.max_length`, or set `data.on_too_long` to drop or truncate"
    if "not UTF-8" in bad.detail:
        return f"{_UTF_8}, or {drop}"
    return f"{_ADVICE.get(bad.reason, _FIX)}, or {drop}"


def _quantiles(counts: Counter[int]) -> dict[str, float]:
    """Return what the quantiles of all lengths are (the nearest one of them), and their mean."""
    lengths = np.array(sorted(counts))
    places = np.cumsum([counts[length] for length in lengths.tolist()])
    num = int(places[-1])
    found = {
        name: int(lengths[np.searchsorted(places, np.around(q * (num - 1)), side="right")])
        for name, q in QUANTILES.items()
    }
    return {**found, "mean": round(sum(length * count for length, count in counts.items()) / num, 1)}
