"""Did it help? What the held-out figures before step 1 and at the end say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_cli.evaluation.diagnosis import worsened

Outcome = Literal["better", "worse", "unclear", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether training helped.

    Attributes:
        outcome: better, worse, unclear (the held-out pairs cannot tell), or unknown (there are no figures to compare).
        headline: The same as a sentence.
        reasons: What it is based on, a sentence each.
    """

    outcome: Outcome
    headline: str
    reasons: Sequence[str]


def verdict(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, chosen_tokens: float | None = None
) -> Verdict:
    """Compare the held-out figures at the end with those before step 1.

    Args:
        before: The figures before step 1, where they are known.
        after: The figures at the end, or so far.
        chosen_tokens: Tokens of a chosen response, as a mean over the held-out pairs, where that is known.
    """
    if not before or not after:
        missing = "before training" if after else "after training"
        what = f"There are no held-out figures from {missing}, so nothing can be compared."
        return Verdict("unknown", "Cannot be told: nothing was measured on held-out pairs", [what])
    # Without the lengths no fall of the log-probabilities is per token: none is reported.
    worse = worsened(before, after, chosen_tokens or float("inf"))
    low, high = after["accuracy_interval"]
    change = _change(before, after)
    if worse:
        return Verdict("worse", "Worse on the held-out pairs", [*(f"{_capital(what)}." for what in worse), change])
    if low > before["rewards/accuracies"]:
        return Verdict("better", "Better on the held-out pairs", [change])
    inside = f"{100 * before['rewards/accuracies']:.1f} %, the accuracy before training, is within the interval"
    if high < before["rewards/accuracies"]:
        return Verdict("worse", "Worse on the held-out pairs", [change])
    return Verdict(
        "unclear",
        "Cannot be told from these held-out pairs",
        [change, f"{inside}: the difference may be chance. More held-out pairs or more steps would tell."],
    )


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say how the accuracy changed, with its interval."""
    low, high = (100 * bound for bound in after["accuracy_interval"])
    return (
        f"Reward accuracy {100 * before['rewards/accuracies']:.1f} % before and "
        f"{100 * after['rewards/accuracies']:.1f} % after (95 % interval {low:.1f} – {high:.1f} %, "
        f"{after['pairs']:,} pairs); loss {before['loss']:.4f} → {after['loss']:.4f}."
    )


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
