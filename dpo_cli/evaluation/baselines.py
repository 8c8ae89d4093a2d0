"""What needs no training to be right about held-out pairs, and the accuracy that length does not explain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpo_cli.evaluation.shares import Columns, Values, quantile_bins, share, share_by

FEWEST_OF_A_SIDE = 10
"""How many pairs with the longer, and with the shorter response chosen a length-controlled accuracy takes.

The 95 % interval of a share of 10 pairs is up to 53 points wide: of fewer, the mean of both sides says nothing.
"""

_MARGIN_BINS = 4
_PAIRS_PER_BIN = 10
"""Fewer in a bin would make an interval of more than 53 points."""


def baselines(columns: Columns) -> dict[str, Any]:
    """Return how often the chosen response is the longer one, the shorter one, and the likelier for the reference."""
    longer = np.sign(_longer(columns)) / 2 + 0.5
    found = {"longer": share(longer), "shorter": share(1 - longer)}
    for name, metric in {"reference_sum": "accuracies", "reference_mean": "accuracies_mean"}.items():
        if (key := f"reference_logps/{metric}") in columns:
            found[name] = share(columns[key])
    return {**found, "chance": {"accuracy": 0.5}}


def length_controlled(columns: Columns) -> dict[str, Any]:
    """Return the reward accuracy where the longer response is chosen as often as the shorter one.

    A = w₌·A₌ + (1 − w₌)·(A₊ + A₋)/2, where A₊, A₋ and A₌ are the accuracies of the pairs whose chosen response is
    longer, shorter and as long, and w₌ is the share of the last of all pairs. It is the balanced accuracy of the
    reward as a guess whether the longer response is chosen, and 50 % where the reward is the length itself.

    The interval combines those of the three, which are of different pairs, as sums of independent estimates:
    A − √Σ(wᵢ(Aᵢ − lᵢ))², A + √Σ(wᵢ(uᵢ − Aᵢ))².

    Source: Brodersen et al. 2010, The balanced accuracy and its posterior distribution, ICPR; Zou and Donner 2008,
    Statistics in Medicine 27, 1693-1702, for the interval.
    """
    longer, right = _longer(columns), columns["rewards/accuracies"]
    sides = {"longer": right[longer > 0], "shorter": right[longer < 0]}
    counts = {name: len(side) for name, side in sides.items()}
    if min(counts.values()) < FEWEST_OF_A_SIDE:
        shown = " and ".join(f"{name} in {count:,}" for name, count in counts.items())
        return {"missing": f"the chosen response is {shown} of these pairs, and {FEWEST_OF_A_SIDE} of each are needed"}
    equal = right[longer == 0]
    weights = dict.fromkeys(sides, (1 - len(equal) / len(right)) / 2)
    if len(equal):
        sides["equal"], weights["equal"] = equal, len(equal) / len(right)
    shares = {name: share(side) for name, side in sides.items()}
    accuracy = math.fsum(weights[name] * one["accuracy"] for name, one in shares.items())
    below, above = (
        math.hypot(*(weights[name] * (one["interval"][end] - one["accuracy"]) for name, one in shares.items()))
        for end in (0, 1)
    )
    interval = [max(0.0, accuracy - below), min(1.0, accuracy + above)]
    return {"pairs": len(right), "accuracy": accuracy, "interval": interval, "by_side": shares}


def by_margin(columns: Columns) -> list[dict[str, Any]]:
    """Return the reward accuracy of pairs with small to large reward margins, whatever their sign."""
    sizes = np.abs(columns["rewards/margins"])
    return share_by(sizes, columns["rewards/accuracies"], quantile_bins(sizes, _MARGIN_BINS, _PAIRS_PER_BIN))


def by_length(columns: Columns) -> list[dict[str, Any]]:
    """Return the reward accuracy by how many tokens longer the chosen response is than the rejected one.

    Each side is cut in two at the median difference of both, so that the bins of the sides can be compared.
    """
    longer = _longer(columns)
    differing = np.abs(longer[longer != 0])
    far = np.zeros(len(longer), np.int64)
    if len(differing) >= 4 * _PAIRS_PER_BIN:
        far += np.abs(longer) > np.median(differing)
    bins = np.sign(longer).astype(np.int64) * (1 + far)
    return share_by(longer, columns["rewards/accuracies"], bins)


def _longer(columns: Columns) -> Values:
    """Return how many tokens longer each chosen response is than the rejected one."""
    return columns["chosen_tokens"] - columns["rejected_tokens"]
