"""A chart as numbers: what `charts.html` draws. Text and marks are placed in percent, so that they keep their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli.reporting.pages.run.series import MAIN, RAW, Point, Series, thinned

WIDTH, HEIGHT = 1000, 300
"""The units that curves are drawn in; the page stretches them."""

_TABLE_ROWS = 12
"""About how many steps the table of a chart has."""

_Y_TICKS, _X_TICKS = 5, 5


@dataclass(frozen=True, slots=True)
class Unit:
    """How values are written, on an axis, at the pointer and in tables.

    Attributes:
        kind: Its name in `page.js`, which writes values at the pointer the same way.
        write: Writes a value.
        size: What is 1 on an axis of round values.
    """

    kind: str
    write: Callable[[float], str]
    size: float = 1.0


def _plain(value: float) -> str:
    return f"{float(f'{value:.4g}'):g}" if value else "0"


PLAIN = Unit("plain", _plain)
PERCENT = Unit("percent", lambda value: f"{100 * value:.1f} %")
GROUPED = Unit("grouped", lambda value: f"{value:,.0f}")
GIB = Unit("gib", lambda value: f"{value / 2**30:.2f} GiB", 2.0**30)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step.

    Attributes:
        kind: `checkpoint`, `resume`, `skipped`, `finding` or `best`.
        step: When.
        text: What.
    """

    kind: str
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the grid, in percent from the left or from the top, and its label."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve as SVG paths: its line, its dots, and its band."""

    series: Series
    line: str
    dots: str
    band: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart that is ready to be drawn.

    Attributes:
        title: What it shows.
        about: A sentence for those who do not know it.
        told: What can be seen in it, in words.
        curves: Its curves, those behind first.
        x_ticks: Steps.
        y_ticks: Values.
        marks: What happened, with the place in percent from the left.
        table: A heading and rows of some steps.
        data: What the pointer shows, for `page.js`.
        legend: The names of its colours, each with its style; none where the title says it.
        small: Whether it takes less space than others.
    """

    title: str
    about: str
    told: str
    curves: Sequence[Curve]
    legend: Sequence[tuple[str, str]]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[tuple[float, Mark]]
    table: Sequence[Sequence[str]]
    data: Mapping[str, Any]
    small: bool = False


def chart(
    title: str,
    about: str,
    series: Sequence[Series],
    unit: Unit,
    *,
    marks: Sequence[Mark] = (),
    last_step: int = 0,
    zero: bool = False,
    small: bool = False,
) -> Chart:
    """Lay out a chart of at least one series with a point.

    Args:
        title: What it shows.
        about: A sentence for those who do not know it.
        series: The curves, those behind first.
        unit: How values are written.
        marks: What happened.
        last_step: Up to which step all charts of a page go.
        zero: Whether 0 is always seen.
        small: Whether it takes less space than others.
    """
    kept = [replace(one, points=thinned(one.points)) for one in series]
    values = [value for one in kept for _, value in one.points]
    values += [bound for one in kept for _, *bounds in one.band for bound in bounds]
    first = min(step for one in kept for step, _ in one.points)
    last = max(last_step, max(step for one in kept for step, _ in one.points), first + 1)
    scale = _Scale.over([*values, *([0.0] if zero else [])], unit)

    def at(step: int) -> float:
        return (step - first) / (last - first)

    return Chart(
        title=title,
        about=about,
        told=" ".join(_told(one, unit) for one in kept if one.kind == MAIN),
        curves=[_curve(one, at, scale) for one in kept],
        legend=[(one.legend or one.name, one.style) for one in kept if one.kind != RAW] if len(kept) > 1 else [],
        x_ticks=[Tick(100 * at(step), f"{step:,}") for step in _step_ticks(first, last)],
        y_ticks=[Tick(100 * scale.down(value), label) for value, label in scale.ticks],
        marks=[(100 * at(mark.step), mark) for mark in marks if first <= mark.step <= last],
        table=_table(kept, unit),
        data={
            "from": first,
            "to": last,
            "unit": unit.kind,
            "series": [
                {"name": one.name, "style": one.style, "x": [x for x, _ in one.points], "y": _short(one.points)}
                for one in kept
            ],
        },
        small=small,
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to heights.

    Attributes:
        low: The value at the bottom.
        high: The value at the top.
        ticks: Round values within it, and their labels.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def over(cls, values: Sequence[float], unit: Unit) -> _Scale:
        """Return a scale that all values are within."""
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            spread = abs(low) * 0.1 or 1.0
            low, high = low - spread, high + spread
        step = _round_step((high - low) / _Y_TICKS / unit.size) * unit.size
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        ticks = [low + index * step for index in range(round((high - low) / step) + 1)]
        return cls(low, high, [(tick, _tick_label(tick, step, unit)) for tick in ticks])

    def down(self, value: float) -> float:
        """Return how far below the top a value is: 0 at the top, 1 at the bottom."""
        return (self.high - value) / (self.high - self.low)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, … times a power of ten that is not below a step."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _tick_label(tick: float, step: float, unit: Unit) -> str:
    """Write a tick with no more digits than tell it from the next."""
    if unit is PERCENT:
        return f"{100 * tick:.{max(0, -math.floor(math.log10(100 * step)))}f} %"
    if unit is GIB:
        return f"{tick / 2**30:.3g} GiB"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 4:
        # Of a curve that hardly moves, labels have as many digits as it takes to be different ones.
        return f"{tick:.{max(2, digits + 1 + math.floor(math.log10(abs(tick))))}g}" if round(tick, digits) else "0"
    return f"{tick:,.{digits}f}" if round(tick, digits) else "0"


def _step_ticks(first: int, last: int) -> Iterator[int]:
    step = max(1, round(_round_step((last - first) / _X_TICKS)))
    yield from range(-(-first // step) * step, last + 1, step)


def _curve(series: Series, at: Callable[[int], float], scale: _Scale) -> Curve:
    """Write a series as paths."""

    def place(step: int, value: float) -> str:
        return f"{WIDTH * at(step):.1f} {HEIGHT * scale.down(value):.1f}"

    corners = [place(step, value) for step, value in series.points]
    band = [place(step, high) for step, _, high in series.band]
    band += [place(step, low) for step, low, _ in reversed(series.band)]
    return Curve(
        series,
        f"M{'L'.join(corners)}" if len(corners) > 1 else "",
        "".join(f"M{corner}h0" for corner in corners) if series.dotted or len(corners) == 1 else "",
        f"M{'L'.join(band)}Z" if len(band) > 2 else "",
    )


def _told(series: Series, unit: Unit) -> str:
    """Say of a curve where it begins, where it ends, and its extremes."""
    (first, begin), (last, end) = series.points[0], series.points[-1]
    # A run's name is written as it is.
    name = series.name if series.style.startswith("run") else f"{series.name[0].upper()}{series.name[1:]}"
    if first == last:
        return f"{name}: {unit.write(end)} at step {last:,}."
    low, high = (function(series.points, key=lambda point: point[1]) for function in (min, max))
    course = f"{name}: {unit.write(begin)} at step {first:,}, {unit.write(end)} at step {last:,}"
    extremes = [
        f"{which} {unit.write(value)} at step {step:,}"
        for which, (step, value) in (("lowest", low), ("highest", high))
        if unit.write(value) not in (unit.write(begin), unit.write(end))
    ]
    return f"{'; '.join([course, *extremes])}."


def _table(series: Sequence[Series], unit: Unit) -> list[list[str]]:
    """Return a heading and the values of some steps: those of curves with few points first."""
    by_step = [dict(one.points) for one in series]
    fewest = min(by_step, key=len)
    steps = _some(sorted(fewest if len(fewest) > 2 else set().union(*by_step)))
    rows = [[f"{step:,}", *(unit.write(one[step]) if step in one else "" for one in by_step)] for step in steps]
    return [["step", *(one.name for one in series)], *rows]


def _some(steps: Sequence[int]) -> list[int]:
    """Return some steps, evenly apart, the first and the last among them."""
    count = min(len(steps), _TABLE_ROWS)
    return [steps[round(index * (len(steps) - 1) / max(1, count - 1))] for index in range(count)]


def _short(points: Sequence[Point]) -> list[float]:
    return [float(f"{value:.6g}") for _, value in points]
