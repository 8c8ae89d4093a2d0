"""How sure a share is that was counted in trials."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""


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
