"""Did it help? What the held-out figures before step 1 and at the end say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_cli.evaluation.baselines import baselines
from dpo_cli.evaluation.findings.held_out_checks import CHANCE
from dpo_cli.evaluation.shares import Columns
from dpo_cli.evaluation.statistics import pairs_needed
from dpo_cli.system.text import several

Outcome = Literal["better", "doubtful", "worse", "unclear", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether training helped.

    Attributes:
        outcome: better, doubtful (better by figures that something else speaks against), worse, unclear (the held-out
            pairs cannot tell), or unknown (there are no figures to compare).
        headline: The same as a sentence.
        reasons: What it is based on, a sentence each.
    """

    outcome: Outcome
    headline: str
    reasons: Sequence[str]


@dataclass(frozen=True, slots=True)
class LengthAlone:
    """What needs no model to be right about pairs: always the longer response, or always the shorter one.

    Attributes:
        which: `longer` or `shorter`, the one that is right more often.
        accuracy: How often it is; where both responses are as long, half.
    """

    which: str
    accuracy: float

    @classmethod
    def on(cls, columns: Columns) -> LengthAlone:
        """Return it of some pairs, given their `chosen_tokens` and `rejected_tokens`."""
        found = baselines(columns)
        which = max(("longer", "shorter"), key=lambda name: float(found[name]["accuracy"]))
        return cls(which, found[which]["accuracy"])


def verdict(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    *,
    lowest: Mapping[str, Any] | None = None,
    length: LengthAlone | None = None,
    harms: Sequence[str] = (),
    doubts: Sequence[str] = (),
) -> Verdict:
    """Compare the held-out figures at the end with those before step 1, and with what length alone gets.

    Args:
        before: The figures before step 1, where they are known.
        after: The figures at the end, or so far.
        lowest: The figures of the evaluation with the lowest loss, and its step.
        length: What length alone gets on the same pairs, where that is known.
        harms: What else the run did to the model, a sentence each.
        doubts: What makes one doubt better figures, a sentence each.
    """
    if not before or not after:
        missing = "before training" if after else "after training"
        what = f"There are no held-out figures from {missing}, so nothing can be compared."
        return Verdict("unknown", "Cannot be told: nothing was compared on held-out pairs", [what])
    low, high = after["accuracy_interval"]
    began, said = before["rewards/accuracies"], [_change(before, after), _baseline(before, length)]
    if after["loss"] > before["loss"] + CHANCE * abs(before["loss"]):
        where = f"; it was lowest, {lowest['loss']:.4f}, at step {lowest['step']:,}" if lowest else ""
        harms = [f"The held-out loss rose above that before training{where}.", *harms]
    if harms or high < began:
        rose = "Worse, although the held-out reward accuracy rose"
        return Verdict("worse", rose if low > began else "Worse on the held-out pairs", [*harms, *said])
    if low <= began:
        why = (
            f"{100 * began:.1f} %, the accuracy before training, is within the interval: the difference may be chance."
        )
        return Verdict("unclear", "Cannot be told from these held-out pairs", [*said, why, *_needed(began, after)])
    if doubts := [*doubts, *_no_better_than_length(after, length)]:
        return Verdict("doubtful", "Better by the figures, which may not mean a better model", [*doubts, *said])
    return Verdict("better", "Better on the held-out pairs", said)


def _no_better_than_length(after: Mapping[str, Any], length: LengthAlone | None) -> list[str]:
    """Say so where the interval of the accuracy does not end above what length alone gets."""
    if length is None or after["accuracy_interval"][0] > length.accuracy:
        return []
    than = "no less often than the model" if length.accuracy >= after["rewards/accuracies"] else "within the interval"
    return [
        f"The {length.which} response is right on {100 * length.accuracy:.1f} % of these pairs, {than}: they cannot "
        "show that the model learned more than length."
    ]


def _baseline(before: Mapping[str, Any], length: LengthAlone | None) -> str:
    """Say what the accuracy has to be above."""
    began = before["rewards/accuracies"]
    if length is None:
        known = "the lengths of these pairs are not recorded"
        return f"Baseline: {100 * began:.1f} %, the accuracy before training; {known}."
    alone = f"length alone (always the {length.which} response)"
    if length.accuracy > began:
        return f"Baseline: {100 * length.accuracy:.1f} %, what {alone} gets on these pairs."
    return f"Baseline: {100 * began:.1f} %, the accuracy before training; {alone} gets {100 * length.accuracy:.1f} %."


def _needed(began: float, after: Mapping[str, Any]) -> list[str]:
    """Say how many held-out pairs would tell, where rewards were all ties before training."""
    right, pairs = after["rewards/accuracies"], round(after["pairs"])
    needed = pairs_needed(round(pairs * (1 - right)), round(pairs * right), pairs, 1.0) if began == 0.5 else None
    return [f"So small a difference would need about {several(needed, 'held-out pair')}."] if needed else []


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say how the accuracy changed, with its interval."""
    low, high = (100 * bound for bound in after["accuracy_interval"])
    return (
        f"Reward accuracy {100 * before['rewards/accuracies']:.1f} % before and "
        f"{100 * after['rewards/accuracies']:.1f} % after (95 % interval {low:.1f} – {high:.1f} %, "
        f"{several(after['pairs'], 'pair')}); loss {before['loss']:.4f} → {after['loss']:.4f}."
    )
