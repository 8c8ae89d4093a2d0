"""Where two answers differ, word by word: for the terminal, for pages, for reports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

_IDEOGRAPHS = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of which each is a word: Chinese and Japanese have no spaces between words."""

_WORD = re.compile(rf"\s*(?:[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s])")
"""A word, or one mark of punctuation, with the white space before it."""

_FEWEST_ALIKE = 2
"""Fewer words between two differences are marked with them: a lone `the` that both have is no common ground."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an answer, and whether the other answer lacks it."""

    text: str
    differs: bool


def differences(one: str, other: str) -> tuple[list[Part], list[Part]]:
    """Cut two texts into what they have in common and what they have not; joined, the parts are the texts again."""
    ours, theirs = _words(one), _words(other)
    alike = list(_alike([word.strip() for word in ours], [word.strip() for word in theirs]))
    return (
        list(_parts(ours, [(start, start + size) for start, _, size in alike])),
        list(_parts(theirs, [(start, start + size) for _, start, size in alike])),
    )


def _words(text: str) -> list[str]:
    """Cut a text into words; white space at its end belongs to the last one."""
    words = _WORD.findall(text)
    rest = text[sum(map(len, words)) :]
    return [*words[:-1], words[-1] + rest] if words else [text] * bool(text)


def _alike(ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield where stretches that both have begin in each, and how long they are; short ones only at an end of both."""
    for found in LCSseq.opcodes(ours, theirs):
        size = found.src_end - found.src_start
        at_start = found.src_start == found.dest_start == 0
        at_end = (found.src_end, found.dest_end) == (len(ours), len(theirs))
        if found.tag == "equal" and (size >= _FEWEST_ALIKE or at_start or at_end):
            yield found.src_start, found.dest_start, size


def _parts(words: Sequence[str], alike: Sequence[tuple[int, int]]) -> Iterator[Part]:
    """Yield the parts of a text, given the stretches of it, start and end, that are not different."""
    done = 0
    for start, end in [*alike, (len(words), len(words))]:
        if start > done:
            yield Part("".join(words[done:start]), differs=True)
        if end > start:
            yield Part("".join(words[start:end]), differs=False)
        done = end
