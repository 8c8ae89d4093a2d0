"""Which evaluation of a run is the best, and whether the run has got no better for too long.

All of it follows from the rows of metrics.jsonl, so that a resumed run decides as one that was never interrupted. The
evaluation before step 1 takes no part: `final/` is what was trained. Of equal evaluations the earlier is the better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BEST_BY = {"loss": -1.0, "rewards/accuracies": 1.0, "rewards/margins": 1.0}
"""The held-out figures by which an evaluation can be the best; times this, more is better."""

Row = Mapping[str, Any]
"""A row of metrics.jsonl."""


def best_steps(rows: Iterable[Row], by: str) -> list[int]:
    """Return the steps of all evaluations after step 0, the best first."""
    evaluated = [row for row in rows if row.get("split") == "eval" and row["step"] > 0]
    return [row["step"] for row in sorted(evaluated, key=lambda row: (-_worth(row, by), row["step"]))]


def best_step(rows: Iterable[Row], by: str) -> int | None:
    """Return the step of the best evaluation after step 0; None: there was none."""
    return next(iter(best_steps(rows, by)), None)


def exhausted(rows: Iterable[Row], by: str | None, patience: int | None) -> bool:
    """Tell whether the last evaluations, as many as the patience, were all no better than the best one before them."""
    if by is None or patience is None:
        return False
    steps = best_steps(rows, by)
    return sum(step > steps[0] for step in steps) >= patience


def is_better(row: Row, than: Row, by: str) -> bool:
    """Tell whether an evaluation is better than another one."""
    return _worth(row, by) > _worth(than, by)


def _worth(row: Row, by: str) -> float:
    """Return what the row of an evaluation is worth; one whose figure is not finite is worth nothing."""
    value = row.get(by)
    return BEST_BY[by] * value if isinstance(value, float) and math.isfinite(value) else -math.inf


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Attributes:
        step: The step after which the weights of `final/` were.
        last: The last step that was taken.
        by: The figure by which that evaluation was the best; None: `final/` is what the last step left.
        figures: The held-out figures of `final/`, in the main process, if there are any.
        of_last: Those after the last step, where `final/` is that of another.
    """

    step: int
    last: int
    by: str | None = None
    figures: Row | None = None
    of_last: Row | None = None

    def columns(self, before: Row) -> dict[str, Row]:
        """Return the columns of a table of figures: before step 1, where these are known, and after training."""
        if not self.figures:
            return {}
        after = {"after": self.figures}
        if self.of_last:
            after = {f"best (step {self.step})": self.figures, f"last (step {self.last})": self.of_last}
        return {**({"before": before} if before else {}), **after}

    @property
    def described(self) -> str:
        """Say which step it is, and by what it was chosen; nothing where nothing was chosen."""
        if self.by is None:
            return ""
        which = "the last" if self.step == self.last else f"training went on to step {self.last}"
        return f"step {self.step}, the best evaluation by {self.by} ({which})"
