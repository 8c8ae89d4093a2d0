"""Rows of every shape, each with the pairs and the texts that a reader would expect of them, written by hand.

A text is what the ChatML template of the tests makes of a conversation. A prompt ends where an answer begins; in an
answer, what stands between ⟦ and ⟧ is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.pairs.shapes import RankedRule
from dpo_cli.data.records import Message, Pair


@dataclass(frozen=True)
class Expected:
    """A pair and its texts."""

    pair: Pair
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Case:
    """Rows of a file, and what should become of them; rows that stand together are read together."""

    about: str
    rows: Sequence[dict[str, Any]]
    expected: Sequence[Expected]
    ranked: RankedRule = "extremes"


def pair(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], **more: Any) -> Pair:
    return Pair(tuple(prompt), tuple(chosen), tuple(rejected), "", **more)


def system(content: str) -> Message:
    return Message("system", content)


def user(content: str, given: str = "") -> Message:
    return Message("user", content, given)


def assistant(content: str, **extras: Any) -> Message:
    return Message("assistant", content, extras=extras)


def tool(content: str, **extras: Any) -> Message:
    return Message("tool", content, extras=extras)
