"""What a person sees: progress and notices on standard error, results on standard output.

On a terminal there is a live bar; on a pipe there are plain lines without control codes. Whatever is said of data,
files or errors is text: no control code in it reaches the terminal, and what looks like a secret is covered. Only the
main process of a run speaks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, cast

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, ConsoleRenderable, RenderHook
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.reporting.secrets import covered

Advance = Callable[[int, int], None]
"""Called with how much is done and how much there is."""

_SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Both streams of the program.

    Args:
        speaks: Whether this process is the one that talks.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        # A name of a model or a folder may hold brackets or colons; neither is markup.
        as_it_is: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
        self._err = _Unheard(stderr=True, quiet=not speaks, **as_it_is)
        self._out = RichConsole(quiet=not speaks, **as_it_is)
        if not self._out.is_terminal:
            # A pipe has no width that a table would have to fit into.
            self._out.width = 10_000
        for stream in (self._err, self._out):
            stream.push_render_hook(_AsText())

    def notice(self, text: str) -> None:
        """Say what is going on."""
        self._err.print(Text(text))

    def warning(self, text: str) -> None:
        """Say what deserves attention."""
        self._err.print(Text.assemble(("warning: ", "bold yellow"), text))

    def error(self, error: UserError, *, after_another: bool = False) -> None:
        """Say what went wrong, where, and how to mend it."""
        if after_another:
            self._err.print()
        self._err.print(Text.assemble(("error: ", "bold red"), error.what))
        if error.where:
            self._err.print(Text(f"  in {error.where}"))
        if error.hint:
            self._err.print(Text.assemble("\n", ("hint: ", "bold cyan"), error.hint))

    def facts(self, facts: Mapping[str, str]) -> None:
        """Show names and values, one a line."""
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            self._err.print(Text.assemble((f"{name:<{width}}  ", "dim"), value))

    def result(self, result: str | Text | Table) -> None:
        """Print a result on standard output.

        Raises:
            UserError: It does not take it, as a full disk does not.
        """
        try:
            self._out.print(Text(result) if isinstance(result, str) else result)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise from_os_error(error, "printing the results", "standard output") from error

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
        """Show how far a long job on pairs is: a bar with the time left, or on a pipe a line now and then."""
        if not self._err.is_terminal:
            self.notice(f"{what}: {num_pairs} pairs")
        with self._bar(TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()) as bar:
            task = bar.add_task(what, total=1)
            started = said = time.monotonic()

            def advance(done: int, total: int) -> None:
                nonlocal said
                bar.update(task, completed=done, total=total)
                now = time.monotonic()
                if not self._err.is_terminal and (now - said >= _SECONDS_BETWEEN_LINES or done == total):
                    said = now
                    left = (now - started) / done * (total - done)
                    rest = f", {clock(left)} left" if done < total else f" in {clock(now - started)}"
                    self.notice(f"{what}: {done}/{total}{rest}")

            yield advance

    @contextlib.contextmanager
    def steps(self, done: int, total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """Show the optimizer's steps: a live bar with the metrics, or on a pipe a line each."""
        figures = TextColumn("{task.fields[figures]}")
        with self._bar(TextColumn("{task.completed}/{task.total}"), figures, TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=total, completed=done, figures="")
            started = time.monotonic()

            def advance(step: int, metrics: Mapping[str, float]) -> None:
                shown = (
                    f"loss {metrics['loss']:.4f}  accuracy {metrics['rewards/accuracies']:.2f}  "
                    f"margin {metrics['rewards/margins']:+.3f}  {metrics['tokens_per_second']:.0f} tokens/s"
                )
                bar.update(task, completed=step, figures=shown)
                if not self._err.is_terminal:
                    left = (time.monotonic() - started) / (step - done) * (total - step)
                    self.notice(f"step {step}/{total}  epoch {metrics['epoch']:.2f}  {shown}  {clock(left)} left")

            yield advance

    def _bar(self, *columns: TextColumn | TimeRemainingColumn) -> Progress:
        """Return a bar that is drawn on a terminal and silent on a pipe."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=self._err,
            disable=not self._err.is_terminal,
            transient=True,
        )


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


def as_text(said: str) -> str:
    r"""Return what can be shown: secrets covered, and what a terminal would obey written out, as `\x1b`."""
    return "".join(
        c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in covered(said)
    )


def gib(num_bytes: int) -> str:
    """Write a number of bytes as a person reads it."""
    return f"{num_bytes / 2**30:.2f} GiB"


def clock(seconds: float) -> str:
    """Write a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
