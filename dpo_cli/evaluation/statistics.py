"""Per-pair results become figures, with an interval where one pair is one trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.reporting.metrics import PAIR_METRICS

_Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


def figures(results: Sequence[PairResult]) -> dict[str, Any]:
    """Return the number of pairs and ties, every metric's mean, and the accuracy's 95 % interval."""
    columns = {name: [result.metrics[name] for result in results] for name in PAIR_METRICS}
    means = {name: math.fsum(values) / len(values) for name, values in columns.items()}
    interval = wilson_interval(means["rewards/accuracies"], len(results))
    ties = sum(value == 0.5 for value in columns["rewards/accuracies"])
    return {"pairs": len(results), "ties": ties, **means, "accuracy_interval": list(interval)}


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        share: Successes per trial, 0 to 1; a tie is half a success.
        trials: How many there were, at least 1.

    Source: Wilson 1927, Journal of the American Statistical Association 22, 209-212.
    """
    square = _Z95**2
    center = share + square / (2 * trials)
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    scale = 1 + square / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
