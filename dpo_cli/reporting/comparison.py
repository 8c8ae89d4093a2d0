"""The comparison of two models as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dpo_cli.evaluation.comparison import Comparison, Disagreement
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.reporting.safe_text import visible
from dpo_cli.system.text import several

_SHARES = ("rewards/accuracies", "logps/accuracies", "logps/accuracies_mean")
"""What is a share of the pairs, of which a difference is told in points."""


def comparison_table(found: Comparison, first: str, second: str) -> Table:
    """Show by how much a second model's figures differ from those of a first one, with intervals and a test.

    Args:
        found: The comparison.
        first: What the first model is called.
        second: What the second one is called.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{second} − {first}", overflow="fold")
    for name in ("difference", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    titles = {figure.key: figure.title for figure in FIGURES}
    for key, difference in found.differences.items():
        ends = [_signed(key, end) for end in difference.interval or ()]
        table.add_row(titles[key], _signed(key, difference.value), " to ".join(ends) or "–")
    num_first, num_second = found.ahead
    table.add_row(f"ahead ({titles[found.compared_by]})", f"{second} on {num_second:,}", f"{first} on {num_first:,}")
    table.add_row("McNemar's exact test", "", f"p = {found.p:.2g}")
    if found.prompts < found.pairs:
        table.add_row(f"  of their {several(found.prompts, 'prompt')}, each once", "", f"p = {found.p_of_prompts:.2g}")
    return table


def disagreement_table(pairs: Sequence[Disagreement], ahead: str, names: tuple[str, str]) -> Table:
    """Show the pairs whose reward margin one of two models makes larger than the other by most.

    Args:
        pairs: At least one.
        ahead: What the model of the larger margins is called.
        names: What both models are called.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(f"margin much larger under {ahead}", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(Text(visible(pair.where)), *(_signed("rewards/margins", margin) for margin in pair.margins))
    return table


def _signed(key: str, difference: float) -> str:
    """Write a difference with its sign; what rounds to nothing has none."""
    digits = 1 if key in _SHARES else 2 if key.startswith("logps/") else 4
    shown = round(100 * difference if key in _SHARES else difference, digits)
    text = f"{shown:+.{digits}f}" if shown else f"{0:.{digits}f}"
    return f"{text} points" if key in _SHARES else text
