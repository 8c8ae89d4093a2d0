"""The check of the data on a terminal: what was read, the findings, an example of each; lines wrap at words.

All explanations and further examples are on the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from dpo_cli.data.checkup.report import Example, Finding, LengthBias, Report
from dpo_cli.reporting.safe_text import as_text, visible
from dpo_cli.reporting.tables import PART_STYLES, percent, tokens_table

_SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
_INDENT, _LABEL_WIDTH = 4, 10
"""Columns before an example, and before its texts."""

_MANY_DROPPED = 0.1
"""The share of dropped rows above which they are shown in bold."""

_FEW_FINDINGS, _SOME_FINDINGS = 2, 5
"""Up to so many findings, each text of an example has two lines, or one; with more findings none, to fit the screen."""

_PIPE_WIDTH = 1000
"""A width that no terminal has."""


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


def reading(setting: str, statistics: Mapping[str, Any]) -> Group:
    """Show what was read for a setting, from which sources, and how long the pairs are."""
    sources = statistics["sources"]
    shapes = ", ".join(dict.fromkeys(visible(source["shape"]) for source in sources))
    counts = [f"{statistics['rows_read']:,} rows of the shape {shapes}", f"{statistics['pairs_kept']:,} pairs"]
    for name, what in (
        ("truncated", "with a truncated prompt"),
        ("weighted", "with a weight other than 1"),
        ("with_margin", "with a margin other than 0"),
    ):
        if count := statistics[name]:
            counts.append(f"{count:,} {what}")
    blocks: list[ConsoleRenderable] = [Wrapped(Text.assemble((f"{setting}: ", "bold"), as_text(", ".join(counts))))]
    if len(sources) > 1:
        blocks += [Text(), _sources_table(sources)]
    return Group(*blocks, Text(), tokens_table(statistics))


def _sources_table(sources: Sequence[Mapping[str, Any]]) -> Table:
    """Show what was read from each source."""
    table = Table(box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("pairs", justify="right", no_wrap=True)
    for source in sources:
        names = (Text(visible(source[name])) for name in ("source", "shape"))
        table.add_row(*names, f"{source['rows']:,}", f"{source['pairs']:,}")
    return table


def findings(report: Report) -> Group:
    """Show the findings, the most severe first, with an example of each, and a summary."""
    num_lines = 2 if len(report.findings) <= _FEW_FINDINGS else int(len(report.findings) <= _SOME_FINDINGS)
    lines: list[ConsoleRenderable] = []
    for finding in report.findings:
        lines.append(_headline(finding, report))
        lines += [_ExampleLines(example, num_lines) for example in finding.examples[:1]]
    return Group(*lines, *([""] if lines else []), *(Wrapped(Text(as_text(line))) for line in _summary(report)))


def _headline(finding: Finding, report: Report) -> Wrapped:
    """Say in one line what was found and how often."""
    share = percent(finding.share)
    pairs = "pair" if finding.count == 1 else "pairs"
    shown = f"{finding.count:,} {pairs} ({share}): {finding.title}{' (heuristic)' * finding.heuristic}"
    style = ""
    if finding.name == "dropped_rows":
        advice = finding.advice[:1].lower() + finding.advice[1:].rstrip(".")
        shown, style = f"{finding.count:,} {finding.title}: {advice}", "bold" * (finding.share > _MANY_DROPPED)
    if finding.name == "length_bias":
        shown = length_bias_line(report.length_bias)
    label = Text(f"{finding.severity:<9}", _SEVERITY_STYLES[finding.severity])
    return Wrapped(Text.assemble((f"{finding.name}: ", "bold"), (_shown(shown), style)), label=label)


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
        max_lines = self._num_lines if options.max_width < _PIPE_WIDTH else 1
        for name, text in self._example.texts.items() if max_lines else ():
            label = Text(f"{name:<{_LABEL_WIDTH}}", PART_STYLES[name])
            yield Wrapped(Text(_shown(text), PART_STYLES[name]), indent=_INDENT, label=label, max_lines=max_lines)

    def _places(self) -> list[str]:
        return [_shown(origin) for origin in (self._example.origin, self._example.other) if origin]


def _short(origin: str, width: int) -> str:
    """Name a place without its folder if the folder would fill a line."""
    return (
        origin
        if len(origin) <= (width - 2 * _INDENT) // 2
        else "+".join(PurePath(one).name for one in origin.split("+"))
    )


def _summary(report: Report) -> Iterator[str]:
    """Summarize what is not a finding."""
    if not any(finding.name == "length_bias" for finding in report.findings):
        yield length_bias_line(report.length_bias)
    if (margins := report.margins) and margins.used:
        yield (
            f"margins that the loss uses: of {margins.pairs:,} pairs, {margins.smallest:g} to {margins.largest:g}, "
            f"median {margins.median:g}"
        )
    if report.num_copies:
        yield f"repeated by the weight of a source, and counted once here: {report.num_copies:,} pairs"
    if report.left_out:
        yield f"left out by `data.drop`: {', '.join(f'{count:,} {name}' for name, count in report.left_out.items())}"
    if report.not_found:
        yield f"{len(report.not_found)} other checks found nothing"


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
