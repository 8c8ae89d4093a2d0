"""Standard output and standard error: whatever is printed is harmless text, and a closed terminal ends no run."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, ConsoleRenderable, RenderHook
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dpo_cli.reporting.safe_text import as_text

_FEWEST_CELLS = 20
"""Text is wrapped to no fewer, however narrow the terminal is."""

_WIDEST = 10_000
"""A width into which every table fits."""

# The name of a model or a folder may contain brackets or colons; neither is markup.
_LITERAL: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}


def error_stream(*, prints: bool) -> RichConsole:
    """Return standard error, which may be closed by its reader."""
    return _hardened(_ErrorStream(stderr=True, quiet=not prints, **_LITERAL))


def output_stream(*, prints: bool) -> RichConsole:
    """Return standard output."""
    stream = _hardened(RichConsole(quiet=not prints, **_LITERAL))
    if not stream.is_terminal:
        # A pipe has no width that a table would have to fit into.
        stream.width = _WIDEST
    return stream


def on_screen(stream: RichConsole) -> bool:
    """Tell whether a stream is a terminal that can move its cursor, and not a pipe for which colours are forced."""
    return stream.is_interactive and stream.file.isatty()


def wrapped(stream: RichConsole, text: str, indent: int = 0) -> Text:
    """Make text harmless, and on a terminal wrap it at words, lines after the first indented."""
    # Before it is split into lines: half a secret would not be recognized.
    shown = Text(as_text(text))
    if not on_screen(stream):
        return shown
    lines = shown.wrap(stream, max(stream.width - indent, _FEWEST_CELLS))
    for line in lines:
        line.rstrip()
    return Text(f"\n{' ' * indent}").join(lines)


def unpadded(stream: RichConsole, table: ConsoleRenderable) -> ConsoleRenderable:
    """Return a table without the spaces at the ends of its lines, which may be thousands on a pipe.

    Where a terminal is too narrow for its figures, lines are longer, and wrapped by the terminal: no figure is cut.
    """
    options = stream.options
    if on_screen(stream):
        if stream.width >= (least := _least_width(stream, table)):
            return table
        options = options.update(width=least)
    rows = stream.render_lines(table, options, pad=False)
    lines = [Text.assemble(*((part.text, part.style or "") for part in row)) for row in rows]
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def _least_width(stream: RichConsole, table: ConsoleRenderable) -> int:
    """Return the width at which a table has all its figures, and its first column is wrapped."""
    if not isinstance(table, Table):
        return 0
    natural = Measurement.get(stream, stream.options.update(max_width=_WIDEST), table).maximum
    first = table.columns[0]
    titles = max(cell_len(str(cell)) for cell in (first.header, *first.cells))
    return natural - max(0, titles - _FEWEST_CELLS)


def _hardened(stream: RichConsole) -> RichConsole:
    stream.push_render_hook(_SafeTextHook())
    return stream


class _ErrorStream(RichConsole):
    """Standard error that its reader may close while the run continues: a step is saved all the same."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    @property
    def file(self) -> IO[str]:
        """The stream to write to."""
        return cast(IO[str], _HangupStream(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


class _HangupStream:
    """A stream that raises BrokenPipeError, as a pipe does, after its terminal was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        with _hangup_as_broken_pipe():
            return self._stream.write(text)

    def flush(self) -> None:
        """Flush what was written."""
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


class _SafeTextHook(RenderHook):
    """Makes everything that is printed harmless, wherever it comes from; the program's own styles stay."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap what is printed."""
        return [_SafeText(renderable) for renderable in renderables]


class _SafeText:
    """Renders something else with its text made harmless."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else segment._replace(text=as_text(segment.text))
