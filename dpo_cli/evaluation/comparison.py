"""Two models compared pair by pair, from the rows that `held_out.jsonl` and `dpo eval` have of the same pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_cli.evaluation.statistics import LEVEL, Estimate, bootstrapped, design_effect, mcnemar, pairs_needed
from dpo_cli.system.text import several

ACCURACY, MARGIN, LIKELIER = "rewards/accuracies", "rewards/margins", "logps/accuracies"
MEASURES = (ACCURACY, MARGIN, "loss", LIKELIER, "logps/accuracies_mean", "logps/chosen", "logps/rejected")
"""The metrics whose differences are told."""

_NUM_NAMED = 5
"""How many of the pairs on which two models disagree most are named, each way."""

_SIZES = "chosen_tokens", "rejected_tokens"

Row = Mapping[str, Any]
"""A row of `held_out.jsonl`."""


@dataclass(frozen=True)
class Disagreement:
    """A pair to which two models give rewards that are far apart.

    Attributes:
        where: Its file and line.
        margins: Its reward margin under the first and under the second model.
    """

    where: str
    margins: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """What a second model does otherwise than a first one on the same pairs; all differences are second − first.

    Attributes:
        pairs: How many pairs both were scored on.
        prompts: How many prompts these have.
        unmatched: How many pairs only the first model was scored on, and only the second.
        differences: By metric, of `MEASURES`, as far as all values of both are finite.
        compared_by: The accuracy that decides: by rewards, or by likelihood where a model's rewards are all ties, as
            those of the reference are.
        ahead: On how many pairs the first model is ahead by that, and on how many the second.
        p: The p-value of McNemar's exact test of these.
        p_of_prompts: The same of prompts, each once: a model is ahead on those of which it is ahead on more pairs.
        needed: How many pairs would tell such a difference apart; None: no number.
        first_ahead: The pairs whose margin is larger under the first model, those of the largest difference.
        second_ahead: The same of the second model.
    """

    pairs: int
    prompts: int
    unmatched: tuple[int, int]
    differences: Mapping[str, Estimate]
    compared_by: str
    ahead: tuple[int, int]
    p: float
    p_of_prompts: float
    needed: int | None
    first_ahead: Sequence[Disagreement]
    second_ahead: Sequence[Disagreement]

    @property
    def better(self) -> int | None:
        """Which model is better, 0 or 1; None: the pairs cannot tell them apart.

        It takes all, the interval and both tests: of few pairs or prompts that differ an interval says too much, and
        the test of pairs does not know of prompts that repeat.
        """
        found = self.differences[self.compared_by]
        alike = found.interval is not None and not found.excludes_zero
        first, second = self.ahead
        if max(self.p, self.p_of_prompts) >= LEVEL or alike or found.value * (second - first) <= 0:
            return None
        return int(second > first)

    def statement(self, first: str = "A", second: str = "B") -> str:
        """Say in words which model is better, or what it would take to know.

        Args:
            first: What the first model is called.
            second: What the second one is called.
        """
        found, names = self.differences[self.compared_by], (first, second)
        by = "" if self.compared_by == ACCURACY else " by which response is likelier"
        if self.better is not None:
            sign = 1 if self.better else -1
            return f"{names[self.better]} is better on these pairs{by}: {_points(found, sign)}{self._margin(*names)}"
        return f"these pairs cannot tell them apart{by}: {self._why_not(*names)}{self._margin(*names)}"

    def _why_not(self, first: str, second: str) -> str:
        """Say why it is not known which model is better."""
        num_first, num_second = self.ahead
        found = _points(self.differences[self.compared_by])
        if self.pairs == 1:
            return "there is only one"
        if not num_first and not num_second:
            return f"neither is ahead on any of {self.pairs:,}"
        if self.needed is None:
            return f"{found}, each model is ahead of the other on {num_first:,} of {self.pairs:,}"
        if self.needed <= self.pairs:
            few = f"but the pairs have only {several(self.prompts, 'prompt')}"
            ahead = f"{second} is ahead on {num_second:,} and {first} on {num_first:,} of {self.pairs:,}"
            return f"{second} − {first} is {found}, {few if self.prompts < self.pairs else ahead}"
        return f"{second} − {first} is {found}, n = {self.pairs:,} would need about {_rounded_up(self.needed):,}"

    def _margin(self, first: str, second: str) -> str:
        """Say whose margins are larger, where that is known; nothing where likelihoods are compared."""
        found = self.differences.get(MARGIN)
        if self.compared_by != ACCURACY or found is None or found.interval is None or not found.excludes_zero:
            return ""
        low, high = sorted(map(abs, found.interval))
        larger = second if found.value > 0 else first
        return f"; the reward margin of {larger} is larger by {abs(found.value):.4f} ({low:.4f} to {high:.4f})"

    def as_dict(self) -> dict[str, Any]:
        """Return what `dpo eval --json` writes of it, but for the names of the models."""
        ways = {"first_ahead": self.first_ahead, "second_ahead": self.second_ahead}
        return {
            "pairs": self.pairs,
            "prompts": self.prompts,
            "differences": {name: found.as_dict() for name, found in self.differences.items()},
            "compared_by": self.compared_by,
            "ahead": list(self.ahead),
            "p": self.p,
            "p_of_prompts": self.p_of_prompts,
            "pairs_needed": self.needed,
            "better": self.better,
            **{way: [{"where": one.where, "margins": list(one.margins)} for one in ones] for way, ones in ways.items()},
        }


def compare(first: Sequence[Row], second: Sequence[Row], *, same_loss: bool = True) -> Comparison | None:
    """Compare two models by the rows of one evaluation of each.

    Pairs are the same that were read at the same place and have the same prompt and responses of the same lengths:
    those whose responses were exchanged in between are not. Others are left out and counted.

    Args:
        first: The rows of the first model: of `held_out.jsonl` those of one step.
        second: The rows of the second model.
        same_loss: Whether both were scored with the same loss. Otherwise losses and reward margins are on different
            scales, and are left out.

    Returns:
        None where no pair is among both.
    """
    ours, theirs = _by_pair(first), _by_pair(second)
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    columns = {name: _values([ours[key] for key in both], [theirs[key] for key in both], name) for name in MEASURES}
    scaled = () if same_loss else ("loss", MARGIN)
    finite = {name: values for name, values in columns.items() if np.isfinite(values).all() and name not in scaled}
    prompts = np.unique([key[1] for key in both], return_inverse=True)[1].reshape(-1)
    apart = np.stack([values[1] - values[0] for values in finite.values()], axis=1)
    by = LIKELIER if any((side == 0.5).all() for side in columns[ACCURACY]) else ACCURACY
    signs = np.sign(columns[by][1] - columns[by][0])
    ahead = int((signs < 0).sum()), int((signs > 0).sum())
    votes = np.sign(np.bincount(prompts, signs))
    first_ahead, second_ahead = _disagreements([key[0] for key in both], columns[MARGIN])
    return Comparison(
        pairs=len(both),
        prompts=int(prompts.max()) + 1,
        unmatched=(len(ours) - len(both), len(theirs) - len(both)),
        differences=dict(zip(finite, bootstrapped(apart, prompts), strict=True)),
        compared_by=by,
        ahead=ahead,
        p=mcnemar(*ahead),
        p_of_prompts=mcnemar(int((votes < 0).sum()), int((votes > 0).sum())),
        needed=pairs_needed(*ahead, len(both), design_effect(signs, prompts)),
        first_ahead=first_ahead,
        second_ahead=second_ahead,
    )


def _by_pair(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Return rows by what says that a pair is the same: place, prompt and lengths, and which pair of these it is."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        at = row["where"], row["prompt_key"], *map(row.get, _SIZES)
        found[(*at, seen[at])] = row
        seen[at] += 1
    return found


def _values(first: Sequence[Row], second: Sequence[Row], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the values of a metric, `[2, pairs]`; one that JSON has no number for is NaN."""
    return np.array([[math.nan if row[name] is None else row[name] for row in rows] for rows in (first, second)])


def _disagreements(
    where: Sequence[str], margins: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[list[Disagreement], list[Disagreement]]:
    """Return the pairs whose margins differ most: those ahead under the first model, and those under the second."""
    apart = margins[1] - margins[0]
    found = []
    for ahead in (-apart, apart):
        largest = [index for index in np.argsort(-ahead, kind="stable")[:_NUM_NAMED] if ahead[index] > 0]
        found.append([Disagreement(where[i], (float(margins[0, i]), float(margins[1, i]))) for i in largest])
    return found[0], found[1]


def _points(found: Estimate, sign: int = 1) -> str:
    """Write a difference of shares in points, with its interval."""
    ends = sorted(100 * sign * end for end in found.interval or ())
    interval = " ({:.1f} to {:.1f})".format(*ends).replace("-", "−") if ends else ""
    return f"{100 * sign * found.value:+.1f} points{interval}".replace("-", "−")


def _rounded_up(number: int) -> int:
    """Round a number that is no better known up to two digits."""
    unit = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // unit) * unit
