"""Which charts a page has, and the curves in them: one entry of `CHARTS` for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dpo_cli.evaluation.findings.history import Row
from dpo_cli.evaluation.verdict import LengthAlone
from dpo_cli.reporting.pages.run.charts import GIB, GROUPED, PERCENT, PLAIN, Chart, Mark, Unit, chart
from dpo_cli.reporting.pages.run.series import MAIN, RAW, Series, points_of, smoothed, thinned
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.safe_text import visible

ACCURACY, INTERVAL = "rewards/accuracies", "accuracy_interval"
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
        small: Whether it takes less space than others: always, or where nothing changes in it.
    """

    title: str
    about: str
    metrics: Sequence[tuple[str, str, str]]
    unit: Unit = PLAIN
    held_out: bool = True
    zero: bool = False
    small: Literal["never", "where flat", "always"] = "where flat"


def _sides(name: str) -> Sequence[tuple[str, str, str]]:
    return [(f"{name}/{side}", side, side) for side in ("chosen", "rejected")]


def _of_steps(title: str, about: str, name: str, unit: Unit, *, zero: bool = True) -> Subject:
    """Return a chart that says how training ran, not what it learned: a small one."""
    return Subject(title, about, [(name, "", "")], unit, held_out=False, zero=zero, small="always")


CHARTS = (
    Subject(
        "Loss",
        "ln 2 = 0.693 is the loss of DPO before anything is learned; lower is better.",
        [("loss", "", "")],
        small="never",
    ),
    Subject(
        "Reward accuracy",
        "The share of pairs whose chosen response has the higher reward; the band is the 95 % interval.",
        [(ACCURACY, "", "")],
        PERCENT,
        small="never",
    ),
    Subject(
        "Reward margin",
        "The reward of the chosen response minus that of the rejected one.",
        [("rewards/margins", "", "")],
        zero=True,
        small="never",
    ),
    Subject("Rewards", "β times how much likelier a response became than it was.", _sides("rewards"), zero=True),
    Subject(
        "Log-probabilities",
        "How likely the model is to write each response, in nats. Where both fall far, it forgets how to write.",
        _sides("logps"),
    ),
    _of_steps("Gradient norm", "Before it is clipped; single peaks are usual.", "grad_norm", PLAIN, zero=False),
    _of_steps("Learning rate", "As the schedule set it.", "learning_rate", PLAIN),
    _of_steps("Tokens per second", "", "tokens_per_second", GROUPED),
    _of_steps("Memory", "", "memory_bytes", GIB),
)
"""All charts, in the order in which they are shown."""

_MOST_DOTS = 60
"""Up to so many evaluations have a dot each."""

_FLAT = 1e-3
"""The share of its size by which a curve may change that is called flat."""

_STEADY = {"learning_rate", "memory_bytes"}
"""Metrics that do not jump from step to step: there is nothing to smooth."""


def charts_of(run: RunRecord, marks: Sequence[Mark], length: LengthAlone | None = None) -> list[Chart]:
    """Draw what a run has recorded; charts without a point are left out.

    Args:
        run: The run.
        marks: What happened.
        length: What length alone gets on the held-out pairs, a line in the chart of the accuracy.
    """
    drawn = []
    for subject in CHARTS:
        held_out = [one for metric in subject.metrics for one in _held_out(run, *metric)] if subject.held_out else []
        series = [one for metric in subject.metrics for one in _training(run, subject, *metric, main=not held_out)]
        if series or held_out:
            alone = _length_alone(run, length) if length and subject.metrics[0][0] == ACCURACY else []
            curves = [*series, *alone, *held_out]
            make = partial(chart, subject.title, subject.about, curves, subject.unit, small=_is_small(subject, curves))
            drawn.append(make(marks=marks, last_step=run.last_step, zero=subject.zero))
    return drawn


def _length_alone(run: RunRecord, length: LengthAlone) -> list[Series]:
    """Return the line of what length alone gets, at each evaluation."""
    points = [(step, length.accuracy) for step, _ in points_of(run.evaluations, ACCURACY)]
    return [Series(f"length alone: always the {length.which} response", "baseline dashed", points)] if points else []


def _is_small(subject: Subject, series: Sequence[Series]) -> bool:
    """Tell whether a chart takes little space: it is of little importance, or flat."""
    ranges = [(min(values), max(values)) for one in series if (values := [value for _, value in one.points])]
    flat = all(high - low <= _FLAT * max(abs(low), abs(high)) for low, high in ranges)
    return subject.small == "always" or (subject.small == "where flat" and flat)


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
        band = thinned_band(run.evaluations) if name == ACCURACY else ()
        style, title = f"{side or 'held'} eval", _joined(called, "held out")
        yield Series(title, style, points, band, dotted=len(points) <= _MOST_DOTS, kind=MAIN)


def _joined(called: str, rest: str) -> str:
    return f"{called}, {rest}" if called else rest


def thinned_band(rows: Sequence[Row]) -> list[tuple[int, float, float]]:
    """Return the interval of the accuracy by step, of as many rows as the accuracy's curve has."""
    kept = {step for step, _ in thinned(points_of(rows, ACCURACY))}
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
                    make = partial(chart, title, subject.about, series, subject.unit, zero=subject.zero)
                    drawn.append(make(small=_is_small(subject, series)))
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
    band = thinned_band(run.evaluations) if held_out and name == ACCURACY else ()
    yield Series(
        f"{called}{f' (mean of {size} steps)' if size > 1 else ''}",
        style_of(index),
        means,
        band,
        dotted=held_out and len(points) <= _MOST_DOTS,
        kind=MAIN,
    )
