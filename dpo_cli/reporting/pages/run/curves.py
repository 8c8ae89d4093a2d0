"""Which charts a page has, and the curves in them: one entry of `CHARTS` for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dpo_cli.evaluation.findings.history import Row
from dpo_cli.reporting.pages.run.charts import GIB, GROUPED, PERCENT, PLAIN, Chart, Mark, Unit, chart
from dpo_cli.reporting.pages.run.series import MAIN, RAW, Series, points_of, smoothed, thinned
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.safe_text import visible

INTERVAL = "accuracy_interval"
RUN_COLOURS = 6
"""So many runs have a colour of their own."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a chart shows.

    Attributes:
        title: Its name.
        about: A sentence for those who do not know it.
        metrics: Names in metrics.jsonl, each with its style and what it is called beside others.
        unit: How values are written.
        held_out: Whether evaluations have it too.
        zero: Whether 0 is always seen.
    """

    title: str
    about: str
    metrics: Sequence[tuple[str, str, str]]
    unit: Unit = PLAIN
    held_out: bool = True
    zero: bool = False


def _sides(name: str) -> Sequence[tuple[str, str, str]]:
    return [(f"{name}/{side}", side, side) for side in ("chosen", "rejected")]


CHARTS = (
    Subject("Loss", "ln 2 = 0.693 is the loss of DPO before anything is learned; lower is better.", [("loss", "", "")]),
    Subject(
        "Reward accuracy",
        "The share of pairs whose chosen response has the higher reward; the band is the 95 % interval.",
        [("rewards/accuracies", "", "")],
        PERCENT,
    ),
    Subject("Rewards", "β times how much likelier a response became than it was.", _sides("rewards"), zero=True),
    Subject(
        "Reward margin",
        "The reward of the chosen response minus that of the rejected one.",
        [("rewards/margins", "", "")],
        zero=True,
    ),
    Subject(
        "Log-probabilities",
        "How likely the model is to write each response, in nats. Where both fall far, it forgets how to write.",
        _sides("logps"),
    ),
    Subject("Gradient norm", "Before it is clipped; single peaks are usual.", [("grad_norm", "", "")], held_out=False),
    Subject("Learning rate", "As the schedule set it.", [("learning_rate", "", "")], held_out=False, zero=True),
    Subject("Tokens per second", "", [("tokens_per_second", "", "")], GROUPED, held_out=False, zero=True),
    Subject("Memory", "", [("memory_bytes", "", "")], GIB, held_out=False, zero=True),
)
"""All charts, in the order in which they are shown."""

_MOST_DOTS = 60
"""Up to so many evaluations have a dot each."""

_STEADY = {"learning_rate", "memory_bytes"}
"""Metrics that do not jump from step to step: there is nothing to smooth."""


def charts_of(run: RunRecord, marks: Sequence[Mark]) -> list[Chart]:
    """Draw what a run has recorded; charts without a point are left out."""
    drawn = []
    for subject in CHARTS:
        held_out = [one for metric in subject.metrics for one in _held_out(run, *metric)] if subject.held_out else []
        series = [one for metric in subject.metrics for one in _training(run, subject, *metric, main=not held_out)]
        if series or held_out:
            make = partial(chart, subject.title, subject.about, [*series, *held_out], subject.unit)
            drawn.append(make(marks=marks, last_step=run.last_step, zero=subject.zero))
    return drawn


def _training(run: RunRecord, subject: Subject, name: str, side: str, called: str, *, main: bool) -> Iterator[Series]:
    """Yield the curve of the steps; where it jumps, behind its means."""
    points = points_of(run.steps, name)
    if not points:
        return
    colour, kind = side or "training", MAIN if main else ""
    each = "training" if subject.held_out else "each step"
    means, size = smoothed(points) if name not in _STEADY else (points, 1)
    if size == 1:
        yield Series(_joined(called, each), colour, points, kind=kind, legend=_joined(called, each))
        return
    of_steps = f"mean of {size} steps"
    shown = f"training, {of_steps}" if subject.held_out else of_steps
    yield Series(_joined(called, each), f"{colour} raw", points, kind=RAW)
    yield Series(_joined(called, shown), colour, means, kind=kind, legend=_joined(called, each))


def _held_out(run: RunRecord, name: str, side: str, called: str) -> Iterator[Series]:
    """Yield the curve of the evaluations, with its interval where there is one."""
    points = points_of(run.evaluations, name)
    if points:
        band = thinned_band(run.evaluations) if name == "rewards/accuracies" else ()
        style, title = f"{side or 'held'} eval", _joined(called, "held out")
        yield Series(title, style, points, band, dotted=len(points) <= _MOST_DOTS, kind=MAIN)


def _joined(called: str, rest: str) -> str:
    return f"{called}, {rest}" if called else rest


def thinned_band(rows: Sequence[Row]) -> list[tuple[int, float, float]]:
    """Return the interval of the accuracy by step, of as many rows as the accuracy's curve has."""
    kept = {step for step, _ in thinned(points_of(rows, "rewards/accuracies"))}
    return [(row["step"], *row[INTERVAL]) for row in rows if row["step"] in kept and INTERVAL in row]


def charts_of_several(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """Draw several runs over each other: held-out curves, and means of the training steps.

    Args:
        runs: The runs.
        names: What each is called.
    """
    drawn = []
    for subject in CHARTS:
        for name, _, called in subject.metrics:
            what = f"{subject.title}: {called}" if called else subject.title
            for split in ("held out", "training") if subject.held_out else ("training",):
                series = [
                    one
                    for index, (run, title) in enumerate(zip(runs, names, strict=True))
                    for one in _of_run(run, visible(title), index, name, split)
                ]
                if series:
                    title = f"{what}, {split}" if subject.held_out else what
                    drawn.append(chart(title, subject.about, series, subject.unit, zero=subject.zero))
    return drawn


def style_of(index: int) -> str:
    """Return the names of a run's colour and line in `run.css`."""
    return f"run{index % RUN_COLOURS}{' dashed' * (index >= RUN_COLOURS)}"


def _of_run(run: RunRecord, called: str, index: int, name: str, split: str) -> Iterator[Series]:
    """Yield the curve of one run of several."""
    held_out = split == "held out"
    points = points_of(run.evaluations if held_out else run.steps, name)
    if not points:
        return
    means, size = (points, 1) if held_out or name in _STEADY else smoothed(points)
    band = thinned_band(run.evaluations) if held_out and name == "rewards/accuracies" else ()
    yield Series(
        f"{called}{f' (mean of {size} steps)' if size > 1 else ''}",
        style_of(index),
        means,
        band,
        dotted=held_out and len(points) <= _MOST_DOTS,
        kind=MAIN,
    )
