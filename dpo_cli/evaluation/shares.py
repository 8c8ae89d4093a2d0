"""Shares of pairs: how often something is right about them, with the interval in which that may lie by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.checkup.intervals import wilson_interval

Values = NDArray[np.float64]
"""A value for each of some pairs, `[pairs]`."""

Columns = Mapping[str, Values]
"""The values of held-out pairs by the name of the metric, as in `held_out_names`."""


def share(right: Values) -> dict[str, Any]:
    """Return how many pairs there are, the share that is right, and its 95 % Wilson interval.

    Args:
        right: 1 where a pair is right, ½ where it is a tie, else 0; at least one pair.
    """
    accuracy = math.fsum(right) / len(right)
    return {"pairs": len(right), "accuracy": accuracy, "interval": list(wilson_interval(accuracy, len(right)))}


def share_by(values: Values, right: Values, bins: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the share of each bin that has pairs, with the least and the largest value in it.

    Args:
        values: What the pairs are binned by.
        right: As in `share`.
        bins: The number of each pair's bin, `[pairs]`.
    """
    found = []
    for number in np.unique(bins):
        inside = bins == number
        bounds = {"from": float(values[inside].min()), "to": float(values[inside].max())}
        found.append({**bounds, **share(right[inside])})
    return found


def quantile_bins(values: Values, most: int, fewest_pairs: int) -> NDArray[np.int64]:
    """Return the number of each pair's bin, `[pairs]`: bins of about as many pairs each, equal values in the same one.

    Args:
        values: What the pairs are binned by.
        most: How many bins there may be.
        fewest_pairs: How many pairs there should be for each bin.
    """
    number = max(1, min(most, len(values) // fewest_pairs))
    edges = np.quantile(values, np.arange(1, number) / number)
    return np.searchsorted(edges, values).astype(np.int64)
