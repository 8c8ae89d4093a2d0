"""What the check of the data looks for: a `Check` is one thing to find, and says all that is said about it.

There are four tables, by how things are found: `TEXT_CHECKS` in the texts of a pair, `TOKEN_CHECKS` while a pair is
tokenized, `COMPARISONS` by comparing pairs, `DATA_CHECKS` in the data as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
"""error: figures of a run would be wrong. warning: training is likely to suffer. info: worth knowing."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look for.

    Attributes:
        name: What the finding is called, in reports and in `data.drop`.
        severity: How grave it is.
        title: What was found, in a few words.
        meaning: One sentence: what was found, and what follows from it.
        advice: One sentence: what to do about it.
        when: What exactly is found, for the page of findings.
        heuristic: Whether it uses a heuristic, which may be wrong about a pair.
        droppable: Whether `data.drop` can leave pairs with it out of a run.
    """

    name: str
    severity: Severity
    title: str
    meaning: str
    advice: str
    when: str = field(kw_only=True)
    heuristic: bool = False
    droppable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedCheck(Check):
    """Something that is looked for while a pair is prepared; whether it was found is kept beside the pair.

    Attributes:
        bit: Which of the 32 bits of a pair's flags says that it was found; each check has its own.
    """

    bit: int

    @property
    def flag(self) -> int:
        """The bit as a number."""
        return 1 << self.bit


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCheck(FlaggedCheck):
    """Something that comes to light when a pair is tokenized.

    Attributes:
        holds: Whether it was found, given a `Tokenized`.
    """

    holds: Callable[[Any], bool]
