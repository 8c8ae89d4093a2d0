"""The page of several runs: their curves over each other, and in which settings and figures they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_cli.evaluation.comparison import compare
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.evaluation.findings.history import Row
from dpo_cli.reporting.card import covered_within
from dpo_cli.reporting.comparison import comparison_table
from dpo_cli.reporting.pages.run.curves import charts_of_several, style_of
from dpo_cli.reporting.pages.run.held_out import Block, usable
from dpo_cli.reporting.pages.run.page import Known, cell, ends_of, findings_of, judge, notes_of, state_of, with_script
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.tables import plain_rows
from dpo_cli.system import plain_yaml
from dpo_cli.system.text import several


def runs_page(runs: Sequence[RunRecord], known: Sequence[Known]) -> str:
    """Write the page.

    Args:
        runs: At least two.
        known: What is known of the configuration of each.
    """
    names = names_of(runs)
    return with_script(
        "run/runs.html",
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        runs=[
            {"name": name, "style": style_of(index), "state": state_of(run), "verdict": judge(run, findings_of(run))}
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        notes=[f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in notes_of(run)],
        charts=charts_of_several(runs, names),
        figures=_figures(runs, names),
        comparisons=list(_comparisons(runs, names)),
        settings=_differing(runs, names),
    )


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Name runs by their folders; by the whole path where several folders have the same name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder.path) for name, run in zip(names, runs, strict=True)]


def _figures(runs: Sequence[RunRecord], names: Sequence[str]) -> list[list[str]]:
    """Return the last held-out figures of each run: a heading, and a row for each figure."""
    last = {name: after for name, run in zip(names, runs, strict=True) if (after := ends_of(run)[1])}
    if not last:
        return []
    rows = [[figure.title.strip(), *(cell(figure, row) for row in last.values())] for figure in FIGURES]
    return [["", *last], ["after step", *(f"{row['step']:,}" for row in last.values())], *rows]


def _comparisons(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[Block]:
    """Yield how each other run differs from the first one on the held-out pairs that both have, pair by pair."""
    first, *others = [_last_pairs(run) for run in runs]
    for name, run, rows in zip(names[1:], runs[1:], others, strict=True):
        title, same_loss = f"{name} beside {names[0]}", run.settings.get("loss") == runs[0].settings.get("loss")
        if found := compare(first, rows, same_loss=same_loss):
            statement = found.statement(names[0], name)
            unmatched = sum(found.unmatched)
            more = [f"{several(unmatched, 'pair')} of one run alone left out."] if unmatched else []
            more += [] if same_loss else ["The losses differ, so that neither losses nor rewards can be compared."]
            table = plain_rows(comparison_table(found, names[0], name))
            yield Block(title, table, [f"{statement[:1].upper()}{statement[1:]}.", *more])
        elif first and rows:
            yield Block(title, remarks=["They have no held-out pair in common, by file, line, prompt and lengths."])
        else:
            yield Block(title, remarks=["One of them has no held_out.jsonl, so that no pair can be compared."])


def _last_pairs(run: RunRecord) -> list[Row]:
    """Return the held-out pairs as the model found them that the run ends with."""
    after = ends_of(run)[1]
    return usable(run.pairs_at(after["step"])) if after else []


def _differing(runs: Sequence[RunRecord], names: Sequence[str]) -> list[list[str]]:
    """Return the settings in which runs differ: a heading, and a row for each."""
    leaves = [dict(_leaves(covered_within(run.settings))) for run in runs]
    settings = list(dict.fromkeys(name for one in leaves for name in one))
    missing = object()
    rows = [
        [name, *("" if name not in one else plain_yaml.written(one[name]) for one in leaves)]
        for name in settings
        if name != "output_dir" and any(one.get(name, missing) != leaves[0].get(name, missing) for one in leaves)
    ]
    return [["setting", *names], *rows] if rows else []


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
