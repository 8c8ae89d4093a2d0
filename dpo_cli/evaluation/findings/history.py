"""What a run has shown so far, in as much memory as a window of steps and three evaluations take."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo_cli.evaluation.findings.facts import RunFacts

Row = Mapping[str, Any]
"""A row of metrics.jsonl, samples.jsonl or held_out.jsonl."""


class History:
    """Rows of a run in their order, of which the opening and the newest are kept.

    Args:
        facts: What is known of the run beside its rows.

    Attributes:
        step: The step that was added last.
        opening: The rows of the first window of steps.
        largest_first_gradient: The largest norm of the opening.
        recent: Those of the last window.
        before: The held-out figures before step 1.
        evaluations: The newest held-out figures, the last three.
        best: The evaluation with the lowest loss, and the mean training loss of the window before it.
        held_out: The held-out pairs' rows of the evaluation before step 1 and of the newest one, by step.
        samples: The answers before step 1 and the newest ones, by step.
    """

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.step = 0
        self.opening: list[Row] = []
        self.largest_first_gradient = 0.0
        self.recent: deque[Row] = deque(maxlen=facts.window)
        self.before: Row | None = None
        self.evaluations: deque[Row] = deque(maxlen=3)
        self.best: tuple[Row, float | None] | None = None
        self.held_out: dict[int, list[Row]] = {}
        self.samples: dict[int, list[Row]] = {}
        self._learning_steps, self._won_steps = 0, 0.0

    def add(self, row: Row) -> None:
        """Take a row of metrics.jsonl."""
        if row.get("split") == "train":
            self._add_step(row)
        elif row.get("split") == "eval":
            self._add_evaluation(row)

    def _add_step(self, row: Row) -> None:
        self.step = row["step"]
        self.recent.append(row)
        if len(self.opening) < self.facts.window:
            self.opening.append(row)
            self.largest_first_gradient = max(self.largest_first_gradient, number(row, "grad_norm") or 0.0)
        accuracy = number(row, "rewards/accuracies")
        if accuracy is not None and self.step > self.facts.warmup_steps:
            self._learning_steps += 1
            self._won_steps += accuracy

    def _add_evaluation(self, row: Row) -> None:
        self.step = row["step"]
        self.evaluations.append(row)
        if not self.step:
            self.before = row
        loss = number(row, "loss")
        if loss is not None and (self.best is None or loss < self.best[0]["loss"]):
            self.best = row, self.mean("loss") if self.step else None

    def add_pair(self, row: Row) -> None:
        """Take a row of held_out.jsonl."""
        _add_to(self.held_out, row)

    def add_sample(self, row: Row) -> None:
        """Take a row of samples.jsonl."""
        _add_to(self.samples, row)

    @property
    def stepped(self) -> bool:
        """Whether the row of this step is there."""
        return bool(self.recent) and self.recent[-1]["step"] == self.step

    @property
    def ends_window(self) -> bool:
        """Whether a whole window of steps ends here: what compares windows looks at each of them once."""
        full = self.stepped and len(self.recent) == self.facts.window
        return full and (self.step % self.facts.window == 0 or self.step == self.facts.num_steps)

    @property
    def evaluated(self) -> Row | None:
        """The held-out figures of this step, if it was evaluated."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] == self.step else None

    @property
    def first_loss(self) -> float | None:
        """The training loss before anything was learned: that of step 1, which without a reference varies by pair."""
        if self.facts.from_reference:
            return number(self.opening[0], "loss") if self.opening else None
        return mean_of(self.opening, "loss")

    @property
    def accuracy_after_warmup(self) -> tuple[float, int]:
        """The training accuracy since the warm-up, and of how many pairs."""
        steps = self._learning_steps
        return (self._won_steps / steps if steps else 0.5), steps * self.facts.pairs_per_step

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the last window; None where a value is missing."""
        return mean_of(self.recent, name)

    def moved(self) -> tuple[float, float] | None:
        """Return by how many nats per token chosen and rejected responses are likelier than before step 1.

        Returns:
            Of the held-out pairs where they were scored, else of the window's pairs where rewards tell; else None.
        """
        if self.before and self.evaluated and self.step:
            changes = [_difference(self.evaluated, self.before, f"logps/{side}") for side in _SIDES]
            return self._per_token(*changes)
        if not self.facts.from_reference or not self.ends_window:
            return None
        loss = self.facts.objective.reward_source
        beta = getattr(loss, "beta", 1.0)
        means = [self.mean(f"rewards/{side}") for side in _SIDES]
        changes = [None if mean is None else mean / beta for mean in means]
        return _both(*changes) if loss.takes_means else self._per_token(*changes)

    def _per_token(self, chosen: float | None, rejected: float | None) -> tuple[float, float] | None:
        both = _both(chosen, rejected)
        lengths = self.facts.chosen_tokens, self.facts.rejected_tokens
        return (both[0] / lengths[0], both[1] / lengths[1]) if both and all(lengths) else None


_SIDES = "chosen", "rejected"


def _both(chosen: float | None, rejected: float | None) -> tuple[float, float] | None:
    return None if chosen is None or rejected is None else (chosen, rejected)


def _difference(after: Row, before: Row, name: str) -> float | None:
    then, now = number(before, name), number(after, name)
    return None if then is None or now is None else now - then


def number(row: Row, name: str) -> float | None:
    """Return a value of a row; None where it is missing or not finite."""
    value = row.get(name)
    # A whole number of a damaged file may be larger than any float.
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None


def mean_of(rows: Iterable[Row], name: str) -> float | None:
    """Return the mean of a value over rows; None where one is missing, or there are no rows."""
    values = [number(row, name) for row in rows]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _add_to(by_step: dict[int, list[Row]], row: Row) -> None:
    """Add a row to those of its step, and forget those between step 0 and it."""
    step = row["step"]
    if step not in by_step:
        for other in [other for other in by_step if other]:
            del by_step[other]
        by_step[step] = []
    by_step[step].append(row)


def changes(before: Sequence[Row], after: Sequence[Row], key: str) -> list[tuple[Row, Row]]:
    """Return what rows became, those that have the same key both times."""
    known = {row.get(key): row for row in before}
    return [(known[row.get(key)], row) for row in after if row.get(key) in known]
