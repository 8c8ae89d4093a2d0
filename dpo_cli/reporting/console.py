"""What the user sees: progress and notices on standard error, results on standard output.

On a terminal a status line is updated below the lines that stay, and text is wrapped at words; on a pipe there are
plain lines without control codes, however long. Only the main process of a run prints.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import ConsoleRenderable
from rich.live import Live
from rich.text import Text

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.reporting.progress import StatusLine, clock, fitted, held_out_figures, lines_between, step_figures
from dpo_cli.reporting.streams import error_stream, on_screen, output_stream, unpadded, wrapped
from dpo_cli.system.text import several

Advance = Callable[[int, int], None]
"""Called with how much is done, and the total."""

STANDARD_OUTPUT = Path("-")
"""The name of a file by which an option means standard output."""

_SECONDS_BETWEEN_LINES = 10.0
_STEP_LINES = {True: 20, False: 200}
"""About how many lines of steps a run prints: on a terminal, above the status line, and on a pipe."""
_REFRESHES_PER_SECOND = 4


class Console:
    """Both streams of the program.

    Args:
        prints: Whether this process prints at all.
        quiet: Whether it prints only errors, results and answers to signals.
    """

    def __init__(self, *, prints: bool = True, quiet: bool = False) -> None:
        self._err, self._out = error_stream(prints=prints), output_stream(prints=prints)
        self._quiet = quiet
        self._has_status_line = on_screen(self._err) and prints and not quiet
        self._printed = self._gap_before_next = False

    def notice(self, text: str) -> None:
        """Report progress or an event."""
        if not self._quiet:
            self._print(text)

    def notices(self, lines: Iterable[str]) -> None:
        """Report several events."""
        for line in lines:
            self.notice(line)

    def warning(self, text: str) -> None:
        """Report a problem that does not stop the program."""
        if not self._quiet:
            self._print(text, ("warning: ", "bold yellow"))

    def error(self, error: UserError) -> None:
        """Report what is wrong, where, and how to fix it."""
        self.block()
        self._print(error.what, ("error: ", "bold red"))
        if error.where:
            self._print(error.where, ("  in ", ""))
        if error.hint:
            self.block()
            self._print(error.hint, ("hint: ", "bold cyan"))

    def answer(self, text: str, ends: bool = False) -> None:
        """Answer a signal; with `ends` the process ends at once, and the cursor of the terminal is restored."""
        if ends and self._has_status_line:
            self._err.show_cursor()
        self._print(text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Print names and values, one per line, as a block."""
        if self._quiet:
            return
        self.block()
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            self._print(value, (f"{name:<{width}}  ", "dim"))
        self.block()

    def result(self, result: str | ConsoleRenderable) -> None:
        """Print a result on standard output.

        Raises:
            UserError: It cannot be written, for instance to a full disk.
        """
        self._fill_gap()
        try:
            self._out.print(wrapped(self._out, result) if isinstance(result, str) else unpadded(self._out, result))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error, "printing the results", "standard output") from error

    def block(self) -> None:
        """Print an empty line before the next one, unless it is the first."""
        self._gap_before_next = self._printed

    def follow_warnings(self) -> None:
        """Show what the program's modules log as warnings."""
        logger = logging.getLogger("dpo_cli")
        logger.handlers = [_Handler(self)]
        logger.propagate = False

    @property
    def has_status_line(self) -> bool:
        """Whether progress is shown on a terminal."""
        return self._has_status_line

    @property
    def has_colour(self) -> bool:
        """Whether standard output shows colours."""
        return self._out.color_system is not None and not self._out.no_color

    @contextlib.contextmanager
    def progress(self, what: str, num_pairs: int, thing: str = "pair") -> Iterator[Advance]:
        """Show the progress of a long job: a line with the time left, or on a pipe a line at intervals.

        The function that it yields is called with the pairs, or other things, of all processes. For none nothing is
        printed.
        """
        if not num_pairs:
            yield lambda done, total: None
            return
        if not self._has_status_line:
            self.notice(f"{what}: {several(num_pairs, thing)}")
        line = StatusLine(f"{what}:", 0, num_pairs)
        printed = line.seconds
        with self._live(line):

            def advance(done: int, total: int) -> None:
                nonlocal printed
                line.update(done)
                late = line.seconds - printed >= _SECONDS_BETWEEN_LINES
                if done == total and (late or not self._has_status_line):
                    self.notice(f"{line.counted} in {clock(line.seconds)}")
                elif late and not self._has_status_line:
                    printed = line.seconds
                    self.notice(f"{line.counted}, {line.left}")

            yield advance

    @contextlib.contextmanager
    def steps(self, done: int, total: int, every: int | None) -> Iterator[Record]:
        """Show the optimizer's steps: lines that stay, and on a terminal a status line below them.

        Args:
            done: Steps that are done.
            total: Steps of the run.
            every: Steps from line to line; None: so many that the record is readable.
        """
        line = StatusLine("step", done, total)
        self.block()
        with self._live(line):
            yield Record(self, line, done, total, every)
        self.block()

    def step_line(self, line: StatusLine, metrics: Mapping[str, float]) -> None:
        """Print a step's line, on a terminal shortened to one line."""
        figures = step_figures(metrics)
        parts = [(line.counted, 0), (f"epoch {metrics['epoch']:.2f}", 4), *figures, (line.left, 0)]
        self.notice(fitted(parts, self._err.width if on_screen(self._err) else None))

    @property
    def step_lines(self) -> int:
        """About how many lines of steps a run prints."""
        return _STEP_LINES[self._has_status_line]

    def _print(self, text: str, lead: tuple[str, str] = ("", "")) -> None:
        """Print text after a lead in its own style; on a terminal, further lines are indented to the first."""
        self._fill_gap()
        self._err.print(Text.assemble(lead, wrapped(self._err, text, len(lead[0]))))
        self._printed = True

    def _fill_gap(self) -> None:
        if self._gap_before_next:
            self._err.print()
        self._gap_before_next = False

    def _live(self, line: StatusLine) -> contextlib.AbstractContextManager[object]:
        """Keep a status line below what is printed, on a terminal."""
        if not self._has_status_line:
            return contextlib.nullcontext()
        return Live(line, console=self._err, transient=True, refresh_per_second=_REFRESHES_PER_SECOND)


class Unattended(Console):
    """For callers that are programs: prints nothing and logs warnings."""

    def __init__(self) -> None:
        super().__init__(prints=False)

    def warning(self, text: str) -> None:
        """Log a problem that does not stop the program."""
        logging.getLogger("dpo_cli").warning(text)


class Record:
    """The lines that a run leaves: some of its steps, every evaluation, every checkpoint.

    Args:
        console: Prints it.
        line: The status line.
        done: Steps that are done.
        total: Steps of the run.
        every: Steps from line to line; None: so many that the record is readable.
    """

    def __init__(self, console: Console, line: StatusLine, done: int, total: int, every: int | None) -> None:
        self._console, self._line, self._total = console, line, total
        # By default the first step is shown too, so that a user sees early whether it is as expected.
        self._first = done + 1 if every is None else total
        self._every = lines_between(every, total, console.step_lines)

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Show a step that was taken."""
        self._line.update(number, step_figures(metrics))
        if number % self._every == 0 or number in (self._first, self._total):
            self._console.step_line(self._line, metrics)

    def evaluated(self, number: int, figures: Mapping[str, Any]) -> None:
        """Show the held-out figures after a step."""
        self._console.notice(f"evaluation after step {number}: {held_out_figures(figures)}")

    def saved(self, number: int, path: Path, *, background: bool) -> None:
        """Show where a step is saved."""
        how = "is being saved" if background else "saved"
        self._console.notice(f"checkpoint of step {number} {how}: {path}")


class _Handler(logging.Handler):
    """Passes the program's log records to the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warning(record.getMessage())


def gib(num_bytes: int) -> str:
    """Write a number of bytes as a person reads it."""
    return f"{num_bytes / 2**30:.2f} GiB"
