"""Whether σ(βΔ) is right as often as it says: its calibration on held-out pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dpo_cli.evaluation.shares import Values, share

_WIDTH = 0.05
_EDGES = np.arange(11, 20) * _WIDTH
"""Where the bins of the confidence end, from ½ to 1."""


def calibration(margins: Values, right: Values) -> dict[str, Any]:
    """Compare how sure σ(βΔ) is of its answer with how often that is right.

    The confidence in a pair is σ(|βΔ|), ½ to 1. The calibration error is Σ_b n_b/n·|accuracy_b − confidence_b| over ten
    bins of the confidence, as wide as each other. It cannot be 0 with few pairs: were every confidence the true
    probability, a bin's Σ(right − confidence) would have the variance Σ c(1 − c) and a mean size of √(2/π) times its
    root, which is summed up as well.

    Source: Guo et al. 2017, On calibration of modern neural networks, arXiv 1706.04599, equation 3.

    Args:
        margins: βΔ of each pair.
        right: 1 where the reward of the chosen response is higher, ½ where they tie, else 0.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    numbers = np.digitize(confidence, _EDGES)
    bins, gaps, by_chance = [], [], []
    for number in np.unique(numbers):
        sure, hits = confidence[numbers == number], right[numbers == number]
        gaps.append(abs(math.fsum(hits - sure)))
        by_chance.append(math.sqrt(2 / math.pi * math.fsum(sure * (1 - sure))))
        bounds = {"from": round(0.5 + _WIDTH * int(number), 2), "to": round(0.55 + _WIDTH * int(number), 2)}
        bins.append({**bounds, "confidence": math.fsum(sure) / len(sure), **share(hits)})
    # log(1 + e^(−x)) without overflow.
    losses = np.logaddexp(0, -margins)
    return {
        "confidence": math.fsum(confidence) / len(confidence),
        "error": math.fsum(gaps) / len(right),
        "error_by_chance": math.fsum(by_chance) / len(right),
        "brier_score": math.fsum(np.expm1(-losses) ** 2) / len(right),
        "log_score": math.fsum(losses) / len(right),
        "bins": bins,
    }
