"""What a person sees: progress and notices on standard error, results on standard output.

On a terminal a line lives below those that stay, and text is wrapped at words; on a pipe there are plain lines without
control codes, as long as they are. Whatever is said of data, files or errors is text: no control code in it reaches
the terminal, and what looks like a secret is covered. Only the main process of a run speaks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, ConsoleRenderable, RenderHook
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.reporting.progress import StatusLine, clock, fitted, held_out_figures, lines_between, step_figures
from dpo_cli.reporting.safe_text import as_text

Advance = Callable[[int, int], None]
"""Called with how much is done and how much there is."""

STANDARD_OUTPUT = Path("-")
"""What an option that names a file is given for standard output."""

_SECONDS_BETWEEN_LINES = 10.0
_STEP_LINES = {True: 20, False: 200}
"""How many lines of steps a run has on a terminal, where a line below them lives, and on a pipe."""
_FEWEST_CELLS = 20
"""Text is wrapped to no fewer, however narrow the terminal is."""
_REFRESHES_PER_SECOND = 4


class Console:
    """Both streams of the program.

    Args:
        speaks: Whether this process is the one that talks.
        quiet: Whether it prints errors, results and answers to signals alone.
    """

    def __init__(self, *, speaks: bool = True, quiet: bool = False) -> None:
        # A name of a model or a folder may hold brackets or colons; neither is markup.
        as_it_is: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
        self._err = _Unheard(stderr=True, quiet=not speaks, **as_it_is)
        self._out = RichConsole(quiet=not speaks, **as_it_is)
        if not self._out.is_terminal:
            # A pipe has no width that a table would have to fit into.
            self._out.width = 10_000
        for stream in (self._err, self._out):
            stream.push_render_hook(_AsText())
        self._quiet = quiet
        self._lives = _on_screen(self._err) and speaks and not quiet
        self._said_something = self._wants_gap = False

    def notice(self, text: str) -> None:
        """Say what is going on."""
        if not self._quiet:
            self._say(text)

    def notices(self, lines: Iterable[str]) -> None:
        """Say several things that are going on."""
        for line in lines:
            self.notice(line)

    def warning(self, text: str) -> None:
        """Say what deserves attention."""
        if not self._quiet:
            self._say(text, ("warning: ", "bold yellow"))

    def error(self, error: UserError) -> None:
        """Say what went wrong, where, and how to fix it."""
        self.block()
        self._say(error.what, ("error: ", "bold red"))
        if error.where:
            self._say(error.where, ("  in ", ""))
        if error.hint:
            self.block()
            self._say(error.hint, ("hint: ", "bold cyan"))

    def answer(self, text: str, ends: bool = False) -> None:
        """Answer a signal; with `ends` the process ends at once, and the terminal is left as it was found."""
        if ends and self._lives:
            self._err.show_cursor()
        self._say(text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Show names and values, one a line, as a block."""
        if self._quiet:
            return
        self.block()
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            self._say(value, (f"{name:<{width}}  ", "dim"))
        self.block()

    def result(self, result: str | ConsoleRenderable) -> None:
        """Print a result on standard output.

        Raises:
            UserError: It does not take it, as a full disk does not.
        """
        self._fill_gap()
        try:
            self._out.print(_wrapped(self._out, result) if isinstance(result, str) else result)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error, "printing the results", "standard output") from error

    def block(self) -> None:
        """Leave a line empty before what is said next, where anything was said before."""
        self._wants_gap = self._said_something

    def follow_warnings(self) -> None:
        """Show what the program's modules log as warnings."""
        logger = logging.getLogger("dpo_cli")
        logger.handlers = [_Handler(self)]
        logger.propagate = False

    @property
    def has_colour(self) -> bool:
        """Whether standard output shows colours."""
        return self._out.color_system is not None and not self._out.no_color

    @contextlib.contextmanager
    def progress(self, what: str, num_pairs: int) -> Iterator[Advance]:
        """Show how far a long job on pairs is: a line with the time left, or on a pipe a line now and then.

        What it yields is called with the pairs of all processes. Where there are none, nothing is said.
        """
        if not num_pairs:
            yield lambda done, total: None
            return
        if not self._lives:
            self.notice(f"{what}: {num_pairs} pairs")
        line = StatusLine(f"{what}:", 0, num_pairs)
        said = line.seconds
        with self._live(line):

            def advance(done: int, total: int) -> None:
                nonlocal said
                line.update(done)
                late = line.seconds - said >= _SECONDS_BETWEEN_LINES
                if done == total and (late or not self._lives):
                    self.notice(f"{line.counted} in {clock(line.seconds)}")
                elif late and not self._lives:
                    said = line.seconds
                    self.notice(f"{line.counted}, {line.left}")

            yield advance

    @contextlib.contextmanager
    def steps(self, done: int, total: int, every: int | None) -> Iterator[Record]:
        """Show the optimizer's steps: lines that stay, and on a terminal one that lives below them.

        Args:
            done: Steps that were taken before.
            total: Steps of the run.
            every: How many steps there are from line to line; None: as many as make a readable record.
        """
        line = StatusLine("step", done, total)
        self.block()
        with self._live(line):
            yield Record(self, line, done, total, every)
        self.block()

    def step_line(self, line: StatusLine, metrics: Mapping[str, float]) -> None:
        """Print a step's line, on a terminal as much of it as one line holds."""
        figures = step_figures(metrics)
        parts = [(line.counted, 0), (f"epoch {metrics['epoch']:.2f}", 4), *figures, (line.left, 0)]
        self.notice(fitted(parts, self._err.width if _on_screen(self._err) else None))

    @property
    def step_lines(self) -> int:
        """How many lines of steps make a readable record."""
        return _STEP_LINES[self._lives]

    def _say(self, text: str, lead: tuple[str, str] = ("", "")) -> None:
        """Print text after a lead in a style of its own; on a terminal the lead hangs out to the left of its lines."""
        self._fill_gap()
        self._err.print(Text.assemble(lead, _wrapped(self._err, text, len(lead[0]))))
        self._said_something = True

    def _fill_gap(self) -> None:
        if self._wants_gap:
            self._err.print()
        self._wants_gap = False

    def _live(self, line: StatusLine) -> contextlib.AbstractContextManager[object]:
        """Keep a line alive below what is printed, on a terminal."""
        if not self._lives:
            return contextlib.nullcontext()
        return Live(line, console=self._err, transient=True, refresh_per_second=_REFRESHES_PER_SECOND)


def _on_screen(stream: RichConsole) -> bool:
    """Tell whether a stream ends in a terminal that can move its cursor, upon which nothing but colours is forced."""
    return stream.is_interactive and stream.file.isatty()


def _wrapped(stream: RichConsole, text: str, indent: int = 0) -> Text:
    """Make text harmless, and on a terminal wrap it at words, lines after the first indented."""
    # Before it is cut into lines: half a secret would not be known as one.
    shown = Text(as_text(text))
    if not _on_screen(stream):
        return shown
    lines = shown.wrap(stream, max(stream.width - indent, _FEWEST_CELLS))
    for line in lines:
        line.rstrip()
    return Text(f"\n{' ' * indent}").join(lines)


class Unattended(Console):
    """For callers that are programs: prints nothing and logs warnings."""

    def __init__(self) -> None:
        super().__init__(speaks=False)

    def warning(self, text: str) -> None:
        """Log what deserves attention."""
        logging.getLogger("dpo_cli").warning(text)


class Record:
    """What is to be read of a run's steps after it: some of them, every evaluation, every checkpoint.

    Args:
        console: Prints it.
        line: The line of the steps that lives.
        done: Steps that were taken before.
        total: Steps of the run.
        every: How many steps there are from line to line; None: as many as make a readable record.
    """

    def __init__(self, console: Console, line: StatusLine, done: int, total: int, every: int | None) -> None:
        self._console, self._line, self._total = console, line, total
        # Left the choice, the first step is shown as well: whether it is as expected is worth knowing early.
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


class _Unheard(RichConsole):
    """Standard error that may be closed by whoever read it, while the run goes on: a step is saved all the same."""

    def on_broken_pipe(self) -> None:
        """Say nothing from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    @property
    def file(self) -> IO[str]:
        """What takes the words."""
        return cast(IO[str], _Line(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


class _Line:
    """A stream that breaks as a pipe does where the terminal behind it is gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with _hangup_as_broken_pipe():
            return self._stream.write(text)

    def flush(self) -> None:
        """Hand on what was written."""
        with _hangup_as_broken_pipe():
            self._stream.flush()


@contextlib.contextmanager
def _hangup_as_broken_pipe() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BrokenPipeError from error


class _Handler(logging.Handler):
    """Hands the program's own log records to the console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warning(record.getMessage())


class _AsText(RenderHook):
    """Makes everything harmless that is printed, wherever it comes from; styles of the program's own stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap what is to be printed."""
        return [_Harmless(renderable) for renderable in renderables]


class _Harmless:
    """Renders something else, its text made harmless."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else segment._replace(text=as_text(segment.text))


def gib(num_bytes: int) -> str:
    """Write a number of bytes as a person reads it."""
    return f"{num_bytes / 2**30:.2f} GiB"
