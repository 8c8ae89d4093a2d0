"""How sure a difference of two models is that were scored on the same pairs, and how many pairs it would take.

Everything looks at differences pair by pair, B − A, and swapping A and B mirrors every result.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

LEVEL, POWER = 0.05, 0.8
"""What a test takes for chance, and how often one with enough pairs finds a difference that is there."""

_Z = NormalDist().inv_cdf(1 - LEVEL / 2)

_RESAMPLES, _SEED = 10_000, 0
"""At 10,000 an end of an interval is known to 0.2 % of its share; with one seed it is the same every time."""

_MOST_RESAMPLED = 5_000
"""Up to how many prompts samples are drawn; of more, a mean is normal, and 100,000 would take a minute and a half."""

_MOST_EXACT = 100
"""Up to how many pairs that differ the power of the exact test is computed; beyond, its approximation is as good."""

_DRAWN_AT_ONCE = 4_000_000
"""Indices that are drawn together: 16 MB of them."""


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs.

    Attributes:
        value: The mean.
        interval: Its 95 % interval; None: a single prompt, or values that are all alike, say nothing of its width.
    """

    value: float
    interval: tuple[float, float] | None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def as_dict(self) -> dict[str, Any]:
        """Return both by name."""
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


def bootstrapped(differences: Numbers, prompts: NDArray[np.int64]) -> list[Estimate]:
    """Return the mean of each column and its 95 % bootstrap interval, by percentiles; of many prompts the normal one.

    Pairs of one prompt are not independent: prompts are drawn, and with each all of its pairs.

    Args:
        differences: `[pairs, columns]`, at least one pair.
        prompts: Which prompt each pair has, `[pairs]`: 0, 1, 2, ….

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13.
    """
    sums, sizes = _by_prompt(differences, prompts)
    means = differences.mean(axis=0)
    ends = _percentiles(sums, sizes) if len(sizes) <= _MOST_RESAMPLED else _normal(sums, sizes)
    spreads = np.ptp(sums / sizes[:, None], axis=0)
    return [
        Estimate(float(mean), (float(low), float(high)) if spread > 0 else None)
        for mean, low, high, spread in zip(means, *ends, spreads, strict=True)
    ]


def _by_prompt(values: Numbers, prompts: NDArray[np.int64]) -> tuple[Numbers, NDArray[np.int64]]:
    """Return the sums of the values of each prompt's pairs, `[prompts, columns]`, and their numbers, `[prompts]`."""
    sums = np.stack([np.bincount(prompts, column) for column in values.T], axis=1).astype(np.float64)
    return sums, np.bincount(prompts).astype(np.int64)


def _percentiles(sums: Numbers, sizes: NDArray[np.int64]) -> Numbers:
    """Return the lower and the upper end of each column's interval, `[2, columns]`, from means of samples."""
    drawn = np.concatenate(list(_resampled(sums, sizes)))
    ends: Numbers = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return ends


def _normal(sums: Numbers, sizes: NDArray[np.int64]) -> Numbers:
    """Return them from the spread of the prompts around the mean of all pairs.

    Source: Kish 1965, Survey Sampling, section 6.3: a mean over clusters of unequal size as a ratio of sums.
    """
    means = sums.sum(axis=0) / sizes.sum()
    apart = sums - means * sizes[:, None]
    errors = np.sqrt((apart**2).sum(axis=0)) / sizes.sum()
    return np.stack([means - _Z * errors, means + _Z * errors])


def _resampled(sums: Numbers, sizes: NDArray[np.int64]) -> Iterator[Numbers]:
    """Yield the means of samples of prompts, drawn with replacement, `[samples, columns]` at a time."""
    generator, num_prompts = np.random.default_rng(_SEED), len(sizes)
    at_once = max(1, _DRAWN_AT_ONCE // num_prompts)
    for start in range(0, _RESAMPLES, at_once):
        shape = (min(at_once, _RESAMPLES - start), num_prompts)
        drawn = generator.integers(num_prompts, size=shape, dtype=np.int32)
        totals = np.stack([column[drawn].sum(axis=1) for column in sums.T], axis=1)
        yield totals / sizes[drawn].sum(axis=1)[:, None]


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Of the pairs on which two models differ, as many should go one way as the other if they are alike. Pairs on which
    they do not differ say nothing. A tie is between right and wrong: a model that ties differs from one that is right,
    and counts as the worse of both. Pairs count as independent.

    Args:
        wins: Pairs on which B is ahead.
        losses: Pairs on which A is ahead.

    Source: McNemar 1947, Psychometrika 12, 153-157; exact: the sign test on the pairs that differ.
    """
    fewer, num = min(wins, losses), wins + losses
    return min(1.0, 2 * math.fsum(_binomial(num, 0.5, fewer)))


def pairs_needed(wins: int, losses: int, pairs: int, design: float = 1.0) -> int | None:
    """Return how many pairs would tell a difference of this size apart, in 80 % of samples at a level of 5 %.

    Assumes that the models differ on other pairs as often as on these, and that one is ahead as often.

    Args:
        wins: Pairs on which B is ahead.
        losses: Pairs on which A is ahead.
        pairs: All pairs, those on which they do not differ included.
        design: As from `design_effect`.

    Returns:
        None where both are ahead equally often: no number would do.

    Source: Connor 1987, Biometrics 43, 207-211, with the correction for continuity; of few pairs exact.
    """
    if wins == losses:
        return None
    differing, difference = (wins + losses) / pairs, abs(wins - losses) / pairs
    # √n solves n·difference − 1 = √n · (z of the level · √differing + z of the power · √variance).
    slope = _Z * math.sqrt(differing) + NormalDist().inv_cdf(POWER) * math.sqrt(differing - difference**2)
    needed = math.ceil(((slope + math.sqrt(slope**2 + 4 * difference)) / (2 * difference)) ** 2)
    if needed * differing <= _MOST_EXACT:
        needed = _exactly_needed(differing, wins / (wins + losses), 2 * needed)
    return math.ceil(design * needed)


def _exactly_needed(differing: float, share: float, most: int) -> int:
    """Return the least number of pairs with which McNemar's exact test has the power.

    Args:
        differing: The share of pairs on which the models differ.
        share: The share of those on which B is ahead.
        most: A number that is enough.
    """
    likely = most * differing
    found = np.array([_found(num, share) for num in range(min(most, round(likely + 8 * math.sqrt(likely) + 10)) + 1)])

    def power(pairs: int) -> float:
        upto = min(pairs, len(found) - 1)
        return float(_binomial(pairs, differing, upto) @ found[: upto + 1])

    return bisect.bisect_left(range(most), POWER, key=power)


def _found(num: int, share: float) -> float:
    """Return how often McNemar's exact test finds something where some pairs differ, a share of them one way."""
    num_outcomes = int(np.searchsorted(2 * np.cumsum(_binomial(num, 0.5, num)), LEVEL))
    outcomes = _binomial(num, share, num)
    return float(outcomes[:num_outcomes].sum() + outcomes[num + 1 - num_outcomes :].sum())


def _binomial(num: int, share: float, upto: int) -> Numbers:
    """Return the probabilities of 0, 1, …, `upto` successes among `num` trials that succeed at a share."""
    k, share = np.arange(upto + 1), min(max(share, 1e-16), 1 - 1e-16)
    # Of binomial coefficients, which outgrow floats, the logarithms.
    coefficients = np.concatenate([[0.0], np.cumsum(np.log((num - k[1:] + 1) / k[1:]))])
    probabilities: Numbers = np.exp(coefficients + k * math.log(share) + (num - k) * math.log1p(-share))
    return probabilities


def design_effect(differences: Numbers, prompts: NDArray[np.int64]) -> float:
    """Return how many pairs, of prompts that repeat as these do, say as much as one whose prompt does not; at least 1.

    Args:
        differences: `[pairs]`.
        prompts: Which prompt each pair has, `[pairs]`.

    Source: Kish 1965, Survey Sampling, section 8.2.
    """
    apart = differences - differences.mean()
    alone = float(apart @ apart)
    sums, _ = _by_prompt(apart[:, None], prompts)
    return max(1.0, float((sums**2).sum()) / alone) if alone else 1.0
