"""What a run's held-out pairs say one by one: baselines, parts of them, and what training changed, pair by pair.

The tables are those of `dpo eval`, of the same names and figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dpo_cli.data.records import LABELS
from dpo_cli.evaluation.comparison import LIKELIER, compare
from dpo_cli.evaluation.details import DETAILS
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.evaluation.findings.history import Row, number
from dpo_cli.evaluation.verdict import LengthAlone
from dpo_cli.preference.objective import Objective
from dpo_cli.reporting.comparison import comparison_table
from dpo_cli.reporting.detail_tables import detail_blocks
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.tables import groups_table, plain_rows

_REFERENCE = {name: f"reference_{name}" for name in ("logps/accuracies", "logps/accuracies_mean")}
"""Metrics that before step 1 are the reference's, where that is the policy before step 1."""


@dataclass(frozen=True, slots=True)
class Block:
    """A table of held-out figures.

    Attributes:
        title: What it shows; empty where its first heading says it.
        rows: A heading, and its rows; empty where there are only remarks.
        remarks: What is said below it.
    """

    title: str
    rows: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()


def held_out_blocks(run: RunRecord, step: int) -> list[Block]:
    """Return what the pairs of an evaluation say; nothing where they are not known one by one.

    Args:
        run: The run.
        step: The step of the evaluation.
    """
    before, after = (usable(run.pairs_at(when)) for when in (0, step))
    if not after or not step:
        return []
    return [*_changes(before, after), *_details(run, before, after), *_groups(after)]


def length_alone(run: RunRecord, step: int) -> LengthAlone | None:
    """Return what length alone gets on the pairs of an evaluation; None where their lengths are not known."""
    columns = _columns(usable(run.pairs_at(step)))
    return LengthAlone.on(columns) if {"chosen_tokens", "rejected_tokens"} <= columns.keys() else None


def usable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of pairs that have all that a comparison reads."""
    named = [row for row in rows if isinstance(row.get("where"), str) and isinstance(row.get("prompt_key"), str)]
    return [row for row in named if all(number(row, name) is not None for name in _COMPARED)]


def _changes(before: Sequence[Row], after: Sequence[Row]) -> Iterator[Block]:
    """Yield what training changed, pair by pair."""
    if found := compare(before, after):
        statement = found.statement("before", "after")
        table = comparison_table(found, "before", "after")
        remarks = [f"{statement[:1].upper()}{statement[1:]}."]
        if found.compared_by == LIKELIER:
            remarks.append("All rewards were ties before training, so that it is asked which response is likelier.")
        yield Block("Before and after, pair by pair", plain_rows(table), remarks)


def _details(run: RunRecord, before: Sequence[Row], after: Sequence[Row]) -> Iterator[Block]:
    """Yield baselines, accuracies of parts, and calibration."""
    if run.facts is None:
        return
    columns = _columns(after)
    if run.facts.from_reference and [row.get("pair") for row in before] == [row.get("pair") for row in after]:
        began = _columns(before)
        columns |= {theirs: began[ours] for ours, theirs in _REFERENCE.items() if ours in began}
    found = {detail.key: _computed(detail.compute, columns, run.facts.objective) for detail in DETAILS}
    if "missing" in found["baselines"]:
        return
    blocks = [
        one for block in detail_blocks(found) for one in (block.renderables if isinstance(block, Group) else [block])
    ]
    first, *others = [plain_rows(one) for one in blocks if isinstance(one, Table)]
    yield Block("Beside what needs no training", first, [one.plain for one in blocks if isinstance(one, Text)])
    yield from (Block("", rows) for rows in others)


def _computed(compute: Any, columns: Mapping[str, Any], objective: Objective) -> Any:
    """Compute a detail; where the rows lack a column, say so."""
    try:
        return compute(columns, objective)
    except KeyError as error:
        return {"missing": f"the rows of the run do not have {error}"}


def _columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the values of all pairs by name, where all of them have one."""
    names = [name for name in (rows[0] if rows else ()) if all(number(row, name) is not None for row in rows)]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}


def _groups(rows: Sequence[Row]) -> Iterator[Block]:
    """Yield the figures of each source and of each category, where there are several."""
    for label in LABELS:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(str(row.get(label) or ""), []).append(row)
        if len(groups) > 1:
            figures = {name: _figures(groups[name]) for name in sorted(groups)}
            yield Block(f"By {label}", plain_rows(groups_table(label, figures)))


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    columns = {name: values.tolist() for name, values in _columns(rows).items()}
    return {figure.key: figure.compute(columns) for figure in FIGURES}


_COMPARED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "logps/accuracies", "logps/accuracies_mean",
)  # fmt: skip
"""What figures and comparisons are computed from."""
