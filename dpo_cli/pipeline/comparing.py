"""Several models that `dpo eval` has scored on the same pairs: each of the others compared with the first."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.evaluation.comparison import Comparison, Row, compare
from dpo_cli.reporting.comparison import comparison_table, disagreement_table
from dpo_cli.reporting.console import Console


@dataclass(frozen=True)
class Measured:
    """What one model gave.

    Attributes:
        figures: As `dpo eval --json` writes them of one model.
        rows: A row for each pair, as in `held_out.jsonl`.
    """

    figures: dict[str, Any]
    rows: Sequence[Row]


def letters(number: int) -> list[str]:
    """Return short names of some models: A, B, …, Z, AA, ….

    Args:
        number: How many.
    """
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    words = ("".join(word) for length in itertools.count(1) for word in itertools.product(alphabet, repeat=length))
    return list(itertools.islice(words, number))


@dataclass(frozen=True)
class Compared:
    """A model beside the first one.

    Attributes:
        names: What the first model and this one are called.
        models: Which they are.
        found: What is different.
    """

    names: tuple[str, str]
    models: tuple[str, str]
    found: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return what `dpo eval --json` writes of both."""
        models = dict(zip(self.names, self.models, strict=True))
        return {"models": models, **self.found.as_dict(), "statement": self.found.statement(*self.names)}

    def show(self, console: Console) -> None:
        """Print what is different, in figures, in words, and by pairs."""
        console.result("")
        console.result(comparison_table(self.found, *self.names))
        console.result("")
        console.result(self.found.statement(*self.names))
        for ahead, pairs in zip(self.names[::-1], (self.found.second_ahead, self.found.first_ahead), strict=True):
            if pairs:
                console.result("")
                console.result(disagreement_table(pairs, ahead, self.names))


def compared(measured: Sequence[Measured]) -> list[Compared]:
    """Compare each of the others with the first model; all were scored on the same pairs."""
    names, (first, *others) = letters(len(measured)), measured
    comparisons = []
    for name, other in zip(names[1:], others, strict=True):
        found = compare(first.rows, other.rows)
        assert found is not None, "all models were scored on the same pairs"
        comparisons.append(Compared((names[0], name), (first.figures["model"], other.figures["model"]), found))
    return comparisons


def as_json(measured: Sequence[Measured], comparisons: Sequence[Compared]) -> dict[str, Any]:
    """Return what `dpo eval --json` writes: the figures of one model, or those of several and their comparisons."""
    if len(measured) == 1:
        return measured[0].figures
    return {
        "models": [one.figures for one in measured],
        "comparisons": [comparison.as_dict() for comparison in comparisons],
    }
