"""Plots as inline SVG: no script, no font, no colour of their own; the page around them gives the colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 360, 130
_LEFT, _BOTTOM = 6, 20
"""Room below a histogram for its numbers, and at the side."""

_SQUARE, _ROOM = 300, 34
"""The side of the plane, and the room below it and at its left."""

_BAR_HEIGHT = 22


def histogram(
    name: str, counts: Sequence[int], bin_width: int, too_long: Sequence[int] = (), *, open_ended: bool = False
) -> str:
    """Draw how many there are in each bin.

    Args:
        name: What is counted; also the name of the colour.
        counts: How many in each bin, from 0 on.
        bin_width: How much a bin spans, in tokens.
        too_long: How many more in each bin were dropped as too long; drawn above the others in a lighter shade.
        open_ended: Whether the last bin also has all longer ones.
    """
    gone = too_long or [0] * len(counts)
    highest, step = max(map(sum, zip(counts, gone, strict=True))), (_WIDTH - 2 * _LEFT) / len(counts)
    base: float = _HEIGHT - _BOTTOM
    last = len(counts) * bin_width
    bars = []
    for place, (count, dropped) in enumerate(zip(counts, gone, strict=True)):
        top = base
        upto = "and more" if open_ended and place + 1 == len(counts) else f"to {(place + 1) * bin_width - 1}"
        shades = ((name, count, ""), (f"{name} gone", dropped, " dropped as too long"))
        for shade, part, what in shades if dropped else shades[:1]:
            height = part / highest * (base - 14)
            top -= height
            bars.append(
                f'<rect class="{shade}" x="{_LEFT + place * step:.1f}" y="{top:.1f}" width="{max(step - 1, 0.5):.1f}" '
                f'height="{height:.1f}"><title>{place * bin_width} {upto} tokens: {part:,}{what}</title></rect>'
            )
    marks = [
        _text(_LEFT, _HEIGHT - 5, "0"),
        _text(_WIDTH / 2, _HEIGHT - 5, f"{last / 2:g}", "middle"),
        _text(_WIDTH - _LEFT, _HEIGHT - 5, f"{last:,} tokens{' and more' * open_ended}", "end"),
        _text(_WIDTH - _LEFT, 10, f"at most {highest:,} in a bin", "end"),
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{base}" y2="{base}"/>',
    ]
    return _svg(_WIDTH, _HEIGHT, f"Token lengths: {name}", [*bars, *marks])


def plane(cells: Sequence[tuple[int, int, int]], bin_width: int) -> str:
    """Draw how many pairs have a chosen and a rejected response of which lengths; on the line both are as long.

    Args:
        cells: The bin of the chosen length, that of the rejected, and how many pairs.
        bin_width: How much a bin spans, in tokens.
    """
    bins = max(max(chosen, rejected) for chosen, rejected, _ in cells) + 1
    side, most = _SQUARE / bins, max(count for *_, count in cells)
    marks = []
    for chosen, rejected, count in cells:
        # The eye tells one from ten as well as a thousand from ten thousand.
        opacity = 0.2 + 0.8 * (math.log(count) / math.log(most) if most > 1 else 1)
        said = f"chosen from {chosen * bin_width}, rejected from {rejected * bin_width} tokens: {count:,}"
        marks.append(
            f'<rect class="cell" x="{_ROOM + rejected * side:.1f}" y="{_SQUARE - (chosen + 1) * side:.1f}" '
            f'width="{side:.1f}" height="{side:.1f}" opacity="{opacity:.2f}"><title>{said}</title></rect>'
        )
    right, middle = _ROOM + _SQUARE, _SQUARE / 2
    marks += [
        f'<line class="axis dashed" x1="{_ROOM}" y1="{_SQUARE}" x2="{right}" y2="0"/>',
        f'<line class="axis" x1="{_ROOM}" y1="{_SQUARE}" x2="{right}" y2="{_SQUARE}"/>',
        f'<line class="axis" x1="{_ROOM}" y1="{_SQUARE}" x2="{_ROOM}" y2="0"/>',
        _text(_ROOM, _SQUARE + 14, "0"),
        _text(right, _SQUARE + 14, f"{bins * bin_width:,}", "end"),
        _text(_ROOM + middle, _SQUARE + 30, "rejected, tokens", "middle"),
        f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, "chosen, tokens", "middle")}</g>',
    ]
    return _svg(right + 2, _SQUARE + _ROOM, "Token lengths of chosen against rejected", marks)


def bars(counts: Mapping[str, int], total: int) -> str:
    """Draw counts as bars below each other, with their names.

    Args:
        counts: How many, by name.
        total: How many the longest possible bar would be.
    """
    rows = []
    for place, (name, count) in enumerate(counts.items()):
        top = place * _BAR_HEIGHT
        length = max(1.0, count / total * 160)
        rows += [
            _text(150, top + 15, name, "end"),
            f'<rect class="dropped" x="158" y="{top + 4}" width="{length:.1f}" height="{_BAR_HEIGHT - 8}"/>',
            _text(164 + length, top + 15, f"{count:,}"),
        ]
    return _svg(_WIDTH + 20, len(counts) * _BAR_HEIGHT, "Dropped rows by reason", rows)


def _svg(width: float, height: float, label: str, marks: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(marks)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
