"""Results as tables and marked text: statistics of prepared data, held-out figures, pairs token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_PART_STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red"}


def statistics_table(statistics: Mapping[str, Any]) -> Table:
    """Show what was read, kept and dropped, and how long it is in tokens."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row("rows read", f"{statistics['rows_read']:,}")
    table.add_row("pairs kept", f"{statistics['pairs_kept']:,}")
    for reason, count in statistics["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    table.add_row("prompt truncated", f"{statistics['truncated']:,}")
    for name, what in (("weighted", "weight other than 1"), ("with_margin", "margin other than 0")):
        if count := statistics[name]:
            table.add_row(what, f"{count:,}")
    return table


def tokens_table(statistics: Mapping[str, Any]) -> Table:
    """Show the token lengths of prompt, chosen and rejected."""
    table = Table(box=None, pad_edge=False)
    names = list(statistics["tokens"]["prompt"])
    table.add_column("tokens", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for part, quantiles in statistics["tokens"].items():
        table.add_row(part, *(f"{quantiles[name]:g}" for name in names))
    return table


def dropped_examples(statistics: Mapping[str, Any]) -> list[str]:
    """Say of each reason which rows were dropped for it, a few of them."""
    lines = []
    for reason, examples in statistics["examples"].items():
        rest = statistics["dropped"][reason] - len(examples)
        more = [f"and {rest:,} more"] if rest else []
        lines += [f"dropped ({reason}): {text}" for text in [*examples, *more]]
    return lines


def figures_table(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show held-out figures, a column for each model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("held-out pairs", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "pairs": lambda f: f"{f['pairs']}",
        "loss": lambda f: f"{f['loss']:.4f}",
        "reward accuracy": lambda f: f"{100 * f['rewards/accuracies']:.1f} %",
        "  95 % interval": lambda f: "{:.1f} – {:.1f} %".format(*(100 * x for x in f["accuracy_interval"])),
        "  ties (counted half)": lambda f: f"{f['ties']}",
        "reward margin": lambda f: _signed(f["rewards/margins"]),
        "reward of chosen": lambda f: _signed(f["rewards/chosen"]),
        "reward of rejected": lambda f: _signed(f["rewards/rejected"]),
        "log-probability of chosen": lambda f: f"{f['logps/chosen']:.2f}",
        "log-probability of rejected": lambda f: f"{f['logps/rejected']:.2f}",
    }
    for name, show in rows.items():
        table.add_row(name, *(show(figures) for figures in columns.values()))
    return table


def _signed(reward: float) -> str:
    """Write a reward with its sign; what rounds to nothing has none."""
    rounded = round(reward, 4)
    return f"{rounded:+.4f}" if rounded else "0.0000"


def marked_pair(origin: str, parts: Mapping[str, Sequence[str]], *, colour: bool) -> Text:
    """Show a pair token by token, its parts told apart by colour, and by their names in any case.

    Args:
        origin: Where the pair was read.
        parts: The decoded tokens of prompt, chosen and rejected.
        colour: Whether colours are seen; without them a bar stands between tokens.
    """
    text = Text.assemble((f"{origin}\n", "bold" if colour else ""))
    for name, tokens in parts.items():
        text.append(f"{name} ({len(tokens)} tokens)\n", style="dim" if colour else "")
        for place, token in enumerate(tokens):
            style = f"{_PART_STYLES[name]}{' reverse' if place % 2 else ''}" if colour else ""
            text.append(visible(token), style=style)
            if not colour and place + 1 < len(tokens):
                text.append("|")
        text.append("\n")
    return text


def visible(token: str) -> str:
    """Write a token so that white space and control characters are seen."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
