"""The status line of a job: its progress, its figures, a bar if there is room, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

Parts = Sequence[tuple[str, int]]
"""The texts of a line, each with its rank: if the line is too long, the highest is left out first, 0 never."""

_GAP = "  "
_BAR_CELLS = 8, 24
"""The fewest and the most cells of a bar."""
_ECHO_CELLS = 3
"""Left free at the end of the line, for the `^C` that a terminal echoes, which would otherwise begin another line."""


def fitted(parts: Parts, width: int | None = None) -> str:
    """Join texts to a line of at most some cells, without those that do not fit; None: all of them."""
    kept = list(parts)
    while width is not None and cell_len(_joined(kept)) > width and any(rank for _, rank in kept):
        kept.remove(max(kept, key=lambda part: part[1]))
    return _joined(kept)


def _joined(parts: Parts) -> str:
    return _GAP.join(text for text, _ in parts)


def step_figures(metrics: Mapping[str, float]) -> Parts:
    """Write the figures of a step."""
    return [
        (f"loss {metrics['loss']:.4f}", 1),
        (f"accuracy {100 * metrics['rewards/accuracies']:.0f} %", 2),
        (f"margin {metrics['rewards/margins']:+.3f}", 3),
        (f"{metrics['tokens_per_second']:.0f} tokens/s", 5),
    ]


def held_out_figures(figures: Mapping[str, Any]) -> str:
    """Write the figures of an evaluation."""
    low, high = (100 * bound for bound in figures["accuracy_interval"])
    return (
        f"loss {figures['loss']:.4f}, accuracy {100 * figures['rewards/accuracies']:.1f} % "
        f"(95 % interval {low:.1f} – {high:.1f} %), margin {figures['rewards/margins']:+.4f}"
    )


def clock(seconds: float) -> str:
    """Write a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StatusLine:
    """The status line of a job, which fits the terminal: the bar is left out first, then figures; the time left stays.

    Args:
        name: What is counted.
        done: How much was done before.
        total: How much there is in total.
    """

    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._begun, self._done, self._total = name, done, done, total
        self._figures: Parts = ()
        self._started = self._updated = time.monotonic()

    def update(self, done: int, figures: Parts = ()) -> None:
        """Set how much is done."""
        self._done, self._figures, self._updated = done, figures, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._started

    @property
    def counted(self) -> str:
        """How much is done, of the total."""
        return f"{self._name} {self._done}/{self._total}"

    @property
    def left(self) -> str:
        """The time left, from the speed so far; it counts down between updates."""
        done = self._done - self._begun
        if not done:
            return "-:-- left"
        needed = (self._updated - self._started) / done * (self._total - self._done)
        return f"{clock(max(needed - (time.monotonic() - self._updated), 0))} left"

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType | Segment]:
        width = options.max_width - _ECHO_CELLS
        parts = [(self.counted, 0), *self._figures, (self.left, 0)]
        line = _joined(parts)
        fewest, most = _BAR_CELLS
        if (room := width - cell_len(line) - len(_GAP)) < fewest:
            yield Text(fitted(parts, width))
            return
        yield Text(self.counted + _GAP, end="")
        yield from console.render(ProgressBar(max(self._total, 1), self._done, width=min(room, most)), options)
        yield Text(line.removeprefix(self.counted))


def lines_between(every: int | None, num_steps: int, num_lines: int) -> int:
    """Return the steps from line to line; for `every` None, so many that a run has about `num_lines` lines."""
    return every or math.ceil(num_steps / num_lines)
