"""Plots as numbers: what `parts.html` draws as SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 360, 130
_LEFT, _BOTTOM = 6, 20
"""Room below a histogram for its numbers, and at the side."""

_SQUARE, _ROOM = 300, 34
"""The side of the plane, and the room below it and at its left."""

_BAR_HEIGHT, _BAR_START, _LONGEST_BAR = 22, 158, 160


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle, the name of its colour in `style.css`, and what a pointer on it shows."""

    style: str
    x: float
    y: float
    width: float
    height: float
    hint: str
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line, and the name of its style in `style.css`."""

    style: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Label:
    """A text, which starts, ends or has its middle at a point; turned, it reads upwards."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of some size; y grows downwards, as in SVG."""

    name: str
    width: float
    height: float
    rectangles: Sequence[Rectangle]
    lines: Sequence[Line]
    labels: Sequence[Label]


def histogram(
    name: str, counts: Sequence[int], bin_width: int, too_long: Sequence[int] = (), *, open_ended: bool = False
) -> Plot:
    """Draw how many there are in each bin.

    Args:
        name: What is counted; also the name of the colour.
        counts: How many in each bin, from 0 on.
        bin_width: How much a bin spans, in tokens.
        too_long: How many more in each bin were dropped as too long; drawn above the others in a lighter shade.
        open_ended: Whether the last bin also has all longer ones.
    """
    dropped = too_long or [0] * len(counts)
    highest, step = max(map(sum, zip(counts, dropped, strict=True))), (_WIDTH - 2 * _LEFT) / len(counts)
    base, last = _HEIGHT - _BOTTOM, len(counts) * bin_width
    bars = []
    for index, (kept, gone) in enumerate(zip(counts, dropped, strict=True)):
        x, width, top = _LEFT + index * step, max(step - 1, 0.5), float(base)
        upto = "and more" if open_ended and index + 1 == len(counts) else f"to {(index + 1) * bin_width - 1}"
        shades = ((name, kept, ""), (f"{name} gone", gone, " dropped as too long"))
        for style, count, what in shades if gone else shades[:1]:
            height = count / highest * (base - 14)
            top -= height
            hint = f"{index * bin_width} {upto} tokens: {count:,}{what}"
            bars.append(Rectangle(style, x, top, width, height, hint))
    labels = (
        Label(_LEFT, _HEIGHT - 5, "0"),
        Label(_WIDTH / 2, _HEIGHT - 5, f"{last / 2:g}", "middle"),
        Label(_WIDTH - _LEFT, _HEIGHT - 5, f"{last:,} tokens{' and more' * open_ended}", "end"),
        Label(_WIDTH - _LEFT, 10, f"at most {highest:,} in a bin", "end"),
    )
    axis = Line("axis", _LEFT, base, _WIDTH - _LEFT, base)
    return Plot(f"Token lengths: {name}", _WIDTH, _HEIGHT, bars, (axis,), labels)


def plane(cells: Sequence[tuple[int, int, int]], bin_width: int) -> Plot:
    """Draw how many pairs have a chosen and a rejected response of which lengths; on the line both are as long.

    Args:
        cells: The bin of the chosen length, that of the rejected, and how many pairs.
        bin_width: How much a bin spans, in tokens.
    """
    bins = max(max(chosen, rejected) for chosen, rejected, _ in cells) + 1
    side, most = _SQUARE / bins, max(count for *_, count in cells)
    squares = []
    for chosen, rejected, count in cells:
        # The eye tells one from ten as well as a thousand from ten thousand.
        opacity = 0.2 + 0.8 * (math.log(count) / math.log(most) if most > 1 else 1)
        hint = f"chosen from {chosen * bin_width}, rejected from {rejected * bin_width} tokens: {count:,}"
        x, y = _ROOM + rejected * side, _SQUARE - (chosen + 1) * side
        squares.append(Rectangle("cell", x, y, side, side, hint, opacity))
    right, middle = _ROOM + _SQUARE, _SQUARE / 2
    lines = (
        Line("axis dashed", _ROOM, _SQUARE, right, 0),
        Line("axis", _ROOM, _SQUARE, right, _SQUARE),
        Line("axis", _ROOM, _SQUARE, _ROOM, 0),
    )
    labels = (
        Label(_ROOM, _SQUARE + 14, "0"),
        Label(right, _SQUARE + 14, f"{bins * bin_width:,}", "end"),
        Label(_ROOM + middle, _SQUARE + 30, "rejected, tokens", "middle"),
        Label(14, middle, "chosen, tokens", "middle", turned=True),
    )
    name = "Token lengths of chosen against rejected"
    return Plot(name, right + 2, _SQUARE + _ROOM, squares, lines, labels)


def bars(name: str, counts: Mapping[str, int]) -> Plot:
    """Draw counts as bars below each other, with their names.

    Args:
        name: What is counted.
        counts: How many, by name.
    """
    rectangles, labels, most = [], [], max(counts.values())
    for index, (label, count) in enumerate(counts.items()):
        top = index * _BAR_HEIGHT
        length = max(1.0, count / most * _LONGEST_BAR)
        rectangles.append(Rectangle("dropped", _BAR_START, top + 4, length, _BAR_HEIGHT - 8, f"{label}: {count:,}"))
        labels += [
            Label(_BAR_START - 8, top + 15, label, "end"),
            Label(_BAR_START + 6 + length, top + 15, f"{count:,}"),
        ]
    return Plot(name, _WIDTH + 20, len(counts) * _BAR_HEIGHT, rectangles, (), labels)
