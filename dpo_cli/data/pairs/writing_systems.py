"""Writing systems, by Unicode ranges: enough to see that two texts are not in one language."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LOOKED_AT = 2000
"""Characters of a text that tell in which writing system it is."""

_FEWEST_LETTERS = 20
"""Letters that show a text's writing system."""

_APART = 0.1
"""The share of letters that two texts in different writing systems may have in the other's."""

_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F),),
    "Armenian": ((0x531, 0x58F),),
    "Hebrew": ((0x590, 0x5FF),),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Devanagari": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Oriya": ((0xB00, 0xB7F),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE00, 0xE7F),),
    "Lao": ((0xE80, 0xEFF),),
    "Tibetan": ((0xF00, 0xFFF),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF),),
    "Ethiopic": ((0x1200, 0x137F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
    # Japanese is written in both: a text of few kana is not another language than one of many.
    "Han and kana": ((0x3040, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7A3)),
}

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
"""A block of code, which is in Latin letters whatever the language around it."""


def _table() -> NDArray[np.uint8]:
    """Return the writing system of every UTF-16 code unit: 0 for none, else one more than its place in `_RANGES`."""
    table = np.zeros(2**16, np.uint8)
    for number, ranges in enumerate(_RANGES.values(), 1):
        for first, last in ranges:
            table[first : last + 1] = number
    return table


_SCRIPT_OF = _table()


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters of a text.

    Attributes:
        counts: How many there are of each writing system.
        total: How many there are.
        script: The writing system of most of them.
    """

    counts: list[int]
    total: int
    script: int

    @classmethod
    def of(cls, text: str) -> Letters:
        """Count the letters at the beginning of a text, blocks of code left out."""
        text = text[:_LOOKED_AT]
        if "```" in text:
            text = _FENCED.sub("", text)
        units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        counts = np.bincount(_SCRIPT_OF[units], minlength=len(_RANGES) + 1)[1:].tolist()
        return cls(counts, sum(counts), counts.index(max(counts)))


def apart(one: Letters, other: Letters) -> bool:
    """Tell whether two texts are each in a writing system that the other hardly uses.

    Texts that mix them, such as explained code or a sentence to be translated, are not distinguished from either.
    """
    if one.script == other.script or min(one.total, other.total) < _FEWEST_LETTERS:
        return False
    return one.counts[other.script] <= _APART * one.total and other.counts[one.script] <= _APART * other.total
