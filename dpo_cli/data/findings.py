"""What the check of the data tells apart: kinds of findings, how grave each is, which can be left out of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
"""error: figures of a run would be wrong. warning: training is likely to suffer. info: worth knowing."""

Droppable = Literal[
    "duplicates",
    "conflicts",
    "leakage",
    "near_identical",
    "replacement_characters",
    "control_characters",
    "blank_response",
    "mixed_scripts",
    "other_script",
    "refusal_chosen",
    "space_at_one_side",
    "multi_turn",
    "repeats_prompt",
    "turn_markers",
]
"""The findings whose pairs `data.drop` can leave out."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        name: What it is called, in reports and in `data.drop`.
        severity: How grave it is.
        title: What was found, in a few words.
        meaning: One sentence: what was found, and what follows from it.
        advice: One sentence: what to do about it.
        heuristic: Whether it goes by a rule of thumb, which may be wrong about a pair.
    """

    name: str
    severity: Severity
    title: str
    meaning: str
    advice: str
    heuristic: bool = False
