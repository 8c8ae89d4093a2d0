"""From rows to the points of a curve: as many as a page can show, with every minimum and maximum among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.evaluation.findings.history import Row, number

Point = tuple[int, float]
"""A step and a value."""

RAW, MAIN = "raw", "main"
"""The kinds of curves: each step, behind its means; and what is told in words."""

MOST_BUCKETS = 240
"""Of a curve with more points than twice as many, each of so many stretches keeps its smallest and its largest."""

_SMOOTHED, _CENTRES = 12, 80
"""A point of a smoothed curve is the mean over one in so many points; and how many such points there are at most."""


@dataclass(frozen=True, slots=True)
class Series:
    """A curve.

    Attributes:
        name: What it is called in the legend and at the pointer.
        style: The names of its colour and of its kind in `style.css`.
        points: Its points; those that a page can show.
        band: The lower and the upper bound of an interval, by step.
        dotted: Whether each of its points is drawn.
        kind: `RAW`, `MAIN` or neither.
        legend: What it is called in the legend, where that is shorter.
    """

    name: str
    style: str
    points: Sequence[Point]
    band: Sequence[tuple[int, float, float]] = ()
    dotted: bool = False
    kind: str = ""
    legend: str = ""


def points_of(rows: Sequence[Row], name: str) -> list[Point]:
    """Return the steps and values of a metric, where it is a finite number."""
    return [(row["step"], value) for row in rows if (value := number(row, name)) is not None]


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return the smallest and the largest point of each of at most `MOST_BUCKETS` stretches, and both ends."""
    if len(points) <= 2 * MOST_BUCKETS:
        return points
    size = -(-len(points) // MOST_BUCKETS)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=_value), max(stretch, key=_value)}
    return sorted(kept)


def smoothed(points: Sequence[Point]) -> tuple[list[Point], int]:
    """Return means of the points around some of them, and how many points such a mean is over; 1: nothing is smoothed.

    At both ends a mean is over those of them that there are.
    """
    size, last = window_of(points), len(points) - 1
    if not size:
        return list(points), 1
    half = size // 2
    centres = sorted({round(last * place / _CENTRES) for place in range(_CENTRES + 1)})
    means = [_mean(points[max(0, centre - half) : centre + half + 1]) for centre in centres]
    return [(points[centre][0], mean) for centre, mean in zip(centres, means, strict=True)], size


def window_of(points: Sequence[object]) -> int:
    """Return how many steps a mean is over, an odd number; 0: nothing is smoothed."""
    half = len(points) // _SMOOTHED // 2
    return 2 * half + 1 if half else 0


def _mean(window: Sequence[Point]) -> float:
    return math.fsum(value for _, value in window) / len(window)


def _value(point: Point) -> float:
    return point[1]
