"""The check of the data on one screen of 80 columns and 40 rows: findings, then the most important figures.

On a pipe it is as wide. All that does not fit is on the page: explanations, more examples, sources, all lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group
from rich.segment import Segment
from rich.text import Text

from dpo_cli.data.checkup.report import Example, Finding, LengthBias, Report
from dpo_cli.data.findings import Severity
from dpo_cli.reporting.safe_text import as_text, visible
from dpo_cli.reporting.tables import PART_STYLES, percent, tokens_table
from dpo_cli.system.text import several

_SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
_INDENT, _LABEL_WIDTH = 4, 10
"""Columns before an example, and before its texts."""

_MANY_DROPPED = 0.1
"""The share of dropped rows above which they are shown in bold."""

_FINDING_LINES = 18
"""Lines for the findings: the figures, the report's place and the notices before it fit below them in 40 rows."""

_SCREEN_WIDTH, _PIPE_WIDTH = 80, 1000
"""The width of what goes to a pipe, and one that no terminal has."""


class Wrapped:
    """Text that wraps at words; longer words are folded.

    Args:
        text: What is shown.
        indent: Columns before its lines.
        label: What is at the left of its first line; the others are indented to it.
        max_lines: The maximum number of lines; the rest is replaced by three dots.
    """

    def __init__(self, text: Text, *, indent: int = 0, label: Text | None = None, max_lines: int | None = None) -> None:
        self._text, self._max_lines = text, max_lines
        self._before = Text.assemble(" " * indent, label or "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = max(options.max_width - self._before.cell_len, 1)
        lines = self._text.wrap(console, width, overflow="fold")
        for number, line in enumerate(lines[: self._max_lines], 1):
            line.rstrip()
            if number == self._max_lines and len(lines) > number:
                line.truncate(width - 1)
                line.rstrip()
                line.append("…")
            yield Text.assemble(self._before if number == 1 else " " * self._before.cell_len, line)


def screen(report: Report) -> ConsoleRenderable:
    """Show the findings, what was read for each setting, how long the training pairs are, and a summary."""
    read = [reading(setting, statistics) for setting, statistics in report.read.items()]
    sides = Wrapped(Text(f"{several(report.num_train, 'pair')} to train on, {report.num_held_out:,} held out"))
    tokens = tokens_table(report.read["data.train"])
    return _AtMostPipe(Group(_Findings(report), *read, sides, tokens, *_summary(report)))


def findings(report: Report) -> ConsoleRenderable:
    """Show the findings and a summary."""
    return _AtMostPipe(Group(_Findings(report), *_summary(report)))


def reading(setting: str, statistics: Mapping[str, Any]) -> Wrapped:
    """Say what was read for a setting."""
    sources = statistics["sources"]
    shapes = ", ".join(dict.fromkeys(visible(source["shape"]) for source in sources))
    from_where = f" from {len(sources):,} sources" if len(sources) > 1 else ""
    counts = [
        f"{several(statistics['rows_read'], 'row')} of the shape {shapes}{from_where}",
        several(statistics["pairs_kept"], "pair"),
    ]
    for name, what in (
        ("truncated", "with a truncated prompt"),
        ("weighted", "with a weight other than 1"),
        ("with_margin", "with a margin other than 0"),
    ):
        if count := statistics[name]:
            counts.append(f"{count:,} {what}")
    return Wrapped(Text.assemble((f"{setting}: ", "bold"), as_text(", ".join(counts))))


class _AtMostPipe:
    """Renders something as wide as the terminal, and on a pipe as wide as a narrow one."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        width = options.max_width if options.max_width < _PIPE_WIDTH else _SCREEN_WIDTH
        yield from console.render(self._inner, options.update(width=width))


class _Findings:
    """The findings, the most severe first, in as much detail as their lines hold, and an empty line after them."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines: list[list[Segment]] = []
        for blocks in self._from_long_to_short():
            lines = console.render_lines(Group(*blocks), options, pad=False)
            if len(lines) <= _FINDING_LINES:
                break
        for line in [*lines, []] if self._report.findings else ():
            yield from line
            yield Segment.line()

    def _from_long_to_short(self) -> Iterator[list[ConsoleRenderable]]:
        """Yield them with examples of two lines a text, of one, of none; without examples; the last by their names."""
        found = self._report.findings
        for num_lines in (2, 1, 0):
            yield [block for finding in found for block in self._with_example(finding, num_lines)]
        for max_lines in (None, 1):
            yield [_headline(finding, self._report, max_lines) for finding in found]
        for count in reversed(range(len(found))):
            headlines = (_headline(finding, self._report, 1) for finding in found[:count])
            yield [*headlines, *_named(found[count:])]

    def _with_example(self, finding: Finding, num_lines: int) -> Iterator[ConsoleRenderable]:
        yield _headline(finding, self._report)
        yield from (_ExampleLines(example, num_lines) for example in finding.examples[:1])


def _headline(finding: Finding, report: Report, max_lines: int | None = None) -> Wrapped:
    """Say what was found and how often."""
    share = percent(finding.share)
    shown = f"{several(finding.count, 'pair')} ({share}): {finding.title}{' (heuristic)' * finding.heuristic}"
    style = ""
    if finding.name == "dropped_rows":
        advice = finding.advice[:1].lower() + finding.advice[1:].rstrip(".")
        shown, style = f"{finding.count:,} {finding.title}: {advice}", "bold" * (finding.share > _MANY_DROPPED)
    if finding.name == "length_bias":
        shown = length_bias_line(report.length_bias)
    text = Text.assemble((f"{finding.name}: ", "bold"), (_shown(shown), style))
    return Wrapped(text, label=_severity(finding.severity), max_lines=max_lines)


def _named(found: Sequence[Finding]) -> Iterator[Wrapped]:
    """Say of findings their names and how often, in a paragraph for each severity."""
    for severity, some in itertools.groupby(found, lambda finding: finding.severity):
        counts = ", ".join(f"{finding.name} {finding.count:,}" for finding in some)
        yield Wrapped(Text(f"also: {counts}"), label=_severity(severity))


def _severity(severity: Severity) -> Text:
    return Text(f"{severity:<9}", _SEVERITY_STYLES[severity])


class _ExampleLines:
    """An example of a finding, indented.

    Args:
        example: The example.
        num_lines: How many lines each of its texts has at most.
    """

    def __init__(self, example: Example, num_lines: int) -> None:
        self._example, self._num_lines = example, num_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[ConsoleRenderable]:
        place = " beside ".join(_short(origin, options.max_width) for origin in self._places())
        if dropped := self._example.texts.get("dropped"):
            yield Wrapped(Text(f"{place}: {_shown(dropped)}"), indent=_INDENT)
            return
        yield Wrapped(Text(place, "dim"), indent=_INDENT)
        for name, text in self._example.texts.items() if self._num_lines else ():
            label, style = Text(f"{name:<{_LABEL_WIDTH}}", PART_STYLES[name]), PART_STYLES[name]
            yield Wrapped(Text(_shown(text), style), indent=_INDENT, label=label, max_lines=self._num_lines)

    def _places(self) -> list[str]:
        return [_shown(origin) for origin in (self._example.origin, self._example.other) if origin]


def _short(origin: str, width: int) -> str:
    """Name a place without its folder if the folder would fill a line."""
    return (
        origin
        if len(origin) <= (width - 2 * _INDENT) // 2
        else "+".join(PurePath(one).name for one in origin.split("+"))
    )


def _summary(report: Report) -> Iterator[Wrapped]:
    """Summarize what is not a finding."""
    yield from (Wrapped(Text(as_text(line))) for line in _summary_lines(report))


def _summary_lines(report: Report) -> Iterator[str]:
    if not any(finding.name == "length_bias" for finding in report.findings):
        yield length_bias_line(report.length_bias)
    if (margins := report.margins) and margins.used:
        yield (
            f"margins that the loss uses: of {several(margins.pairs, 'pair')}, {margins.smallest:g} to "
            f"{margins.largest:g}, median {margins.median:g}"
        )
    if report.num_copies:
        yield f"repeated by the weight of a source, and counted once here: {several(report.num_copies, 'pair')}"
    if report.left_out:
        yield f"left out by `data.drop`: {', '.join(f'{count:,} {name}' for name, count in report.left_out.items())}"
    if report.not_found:
        yield f"{len(report.not_found)} {'other ' if report.findings else ''}checks found nothing"


def _shown(text: str) -> str:
    """Make everything in a text visible except secrets, which would not be recognized once it is cut."""
    return as_text(visible(text))


def length_bias_line(bias: LengthBias) -> str:
    """Say how often the longer response is the chosen one."""
    low, high = (100 * bound for bound in bias.interval)
    share = f"{100 * bias.accuracy:.1f} % of pairs (ties count half; 95 % interval {low:.1f} – {high:.1f} %)"
    return f"the longer response is the chosen one in {share}"


class PathLine:
    """The name of a file, never folded; on a separate line if it does not fit beside its title."""

    def __init__(self, title: str, path: PurePath) -> None:
        self._title, self._path = title, path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = f"{self._title}: {self._path}"
        fits = len(line) <= options.max_width
        yield Text(line if fits else f"{self._title}:\n{self._path}", no_wrap=True, overflow="ignore")
