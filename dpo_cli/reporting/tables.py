"""Results as tables and marked text: token lengths, held-out figures, pairs token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.reporting.safe_text import visible
from dpo_cli.system.text import several

PART_STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red"}
_GROUPS = 20
"""The maximum number of groups of held-out pairs in a table."""


def tokens_table(statistics: Mapping[str, Any]) -> Table:
    """Show the token lengths of prompt, chosen and rejected."""
    table = Table(box=None, pad_edge=False)
    names = list(statistics["tokens"]["prompt"])
    table.add_column("tokens", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for part, quantiles in statistics["tokens"].items():
        table.add_row(part, *(f"{quantiles[name]:g}" for name in names))
    return table


HELD_OUT = "held-out pairs"
"""What the pairs are called that figures are mostly of."""


def percent(share: float) -> str:
    """Write a share so that a small one is not shown as 0 %, nor one just below 1 as 100 %."""
    shown = f"{100 * share:.1f} %"
    if shown == "0.0 %" and share > 0:
        return "< 0.1 %"
    return "> 99.9 %" if shown == "100.0 %" and share < 1 else shown


def figures_table(columns: Mapping[str, Mapping[str, Any]], scored: str = HELD_OUT) -> Table:
    """Show figures of the pairs that were scored, a column for each model."""
    table = Table(box=None, pad_edge=False)
    table.add_column(scored, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for figure in FIGURES:
        table.add_row(figure.title, *(figure.cell(figures) for figures in columns.values()))
    return table


Cells = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""The columns of a table: what is above each, and how it is written out of the figures of a row."""

_CELLS: Cells = {figure.title.strip(): figure.cell for figure in FIGURES if figure.of_groups}


def groups_table(label: str, groups: Mapping[str, Mapping[str, Any]], cells: Cells = _CELLS) -> Table:
    """Show held-out figures of groups of pairs, a row for each of the largest, in the order given."""
    table = Table(box=None, pad_edge=False)
    table.add_column(label, overflow="fold")
    for name in ("pairs", *cells):
        table.add_column(name, justify="right", no_wrap=True)
    largest = sorted(groups, key=lambda group: (-groups[group]["pairs"], group))[:_GROUPS]
    for group in (group for group in groups if group in largest):
        figures = groups[group]
        row = (cell(figures) for cell in cells.values())
        table.add_row(Text(visible(group) or "(none)"), f"{figures['pairs']:,}", *row)
    if rest := len(groups) - len(largest):
        table.add_row(f"and {rest:,} more, in the JSON")
    return table


def plain_rows(table: Table) -> list[list[str]]:
    """Return a table's headings and cells as text, for pages."""
    headings = [str(column.header) for column in table.columns]
    cells = zip(*(list(column.cells) for column in table.columns), strict=True)
    return [headings, *([cell.plain if isinstance(cell, Text) else str(cell) for cell in row] for row in cells)]


@dataclass(frozen=True, slots=True)
class MarkedPair:
    """A pair token by token.

    Attributes:
        origin: Where the pair was read.
        parts: The decoded tokens of prompt, chosen and rejected.
        context: Indices of tokens within the responses that are not scored, by part.
    """

    origin: str
    parts: Mapping[str, Sequence[str]]
    context: Mapping[str, Collection[int]]


def marked_pair(pair: MarkedPair, *, colour: bool) -> Text:
    """Show a pair token by token, its parts distinguished by colour, and by their names in any case.

    Args:
        pair: The pair.
        colour: Whether colours are seen; without them a bar is between tokens.
    """
    text = Text.assemble((f"{visible(pair.origin)}\n", "bold" if colour else ""))
    for name, tokens in pair.parts.items():
        unscored = pair.context.get(name, ())
        about = f", {len(unscored)} of them context: in ⟨ ⟩" if unscored else ""
        text.append(f"{name} ({several(len(tokens), 'token')}{about})\n", style="dim" if colour else "")
        for index, token in enumerate(tokens):
            style = PART_STYLES["prompt" if index in unscored else name] if colour else ""
            if index in unscored and index - 1 not in unscored:
                text.append("⟨")
            text.append(visible(token), style=f"{style}{' reverse' if colour and index % 2 else ''}")
            if index in unscored and index + 1 not in unscored:
                text.append("⟩")
            if not colour and index + 1 < len(tokens):
                text.append("|")
        text.append("\n")
    return text
