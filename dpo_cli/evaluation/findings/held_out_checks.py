"""What is looked for in held-out figures; `HELD_OUT_CHECKS` at the end lists it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist

from dpo_cli.data.records import LABELS
from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.history import History, Row, mean_of, number
from dpo_cli.evaluation.findings.remedies import (
    CHECK_DATA,
    FEWER_STEPS,
    KEEP_BEST,
    LOWER_RATE,
    RAISE_BETA,
    TRAIN_ADAPTER,
    plain,
)

CHANCE = 0.01
"""The share of the loss by which it may rise: less comes from rounding, and from a run too short to learn anything."""

_TURNED = 0.1
"""The share of what the held-out loss had gained that it may lose again: it goes up and down a little."""

_LEAST_PAIRS = 10
"""Held-out pairs of a category: of fewer, even none that is right could be chance among many categories."""

_FALSE_ALARMS = 0.01
"""The probability that any category of a run is found by chance."""


def _loss_rose(history: History) -> str:
    """Find a held-out loss above that before step 1, at two evaluations in a row or at the last step."""
    began = number(history.before, "loss") if history.before else None
    losses = _values(_agreeing(history), "loss")
    if began is None or not losses or min(losses) <= began + CHANCE * abs(began):
        return ""
    return f"from {began:.4f} to {losses[-1]:.4f}"


def _accuracy_fell(history: History) -> str:
    """Find a held-out accuracy below that before step 1 by more than chance, as long as a loss has to have risen."""
    began = number(history.before, _ACCURACY) if history.before else None
    rows = _agreeing(history)
    accuracies = _values(rows, _ACCURACY)
    highs = [interval[1] for row in rows if (interval := row.get("accuracy_interval"))]
    # A fall within the interval may be chance.
    if began is None or not accuracies or len(highs) < len(rows) or max(highs) >= began:
        return ""
    return f"from {100 * began:.1f} % to {100 * accuracies[-1]:.1f} %, 95 % interval to {100 * highs[-1]:.1f} %"


def _overfitting(history: History) -> str:
    """Find a held-out loss that rises again from its lowest, at two evaluations in a row, while training falls."""
    began = number(history.before, "loss") if history.before else None
    losses, training = _values(_agreeing(history), "loss"), history.mean("loss")
    if began is None or history.best is None or len(losses) < 2 or training is None:
        return ""
    best, training_then = history.best
    training_then = training_then if best["step"] else history.first_loss
    rise = max(_TURNED * (began - best["loss"]), CHANCE * abs(began))
    if min(losses) <= best["loss"] + rise or training_then is None:
        return ""
    if training >= training_then - CHANCE * abs(training_then):
        return ""
    return (
        f"held-out loss {best['loss']:.4f} at step {best['step']:,}, now {losses[-1]:.4f}; training loss "
        f"{training_then:.4f}, now {training:.4f}"
    )


def _agreeing(history: History) -> list[Row]:
    """Return the evaluations that have to agree: the last two after step 0, or the one of the last step."""
    if not history.evaluated or not history.step:
        return []
    newest = [row for row in history.evaluations if row["step"]][-2:]
    return newest if len(newest) == 2 or history.step == history.facts.num_steps else []


def _values(rows: Iterable[Row], name: str) -> list[float]:
    """Return a value of all rows; nothing where one is missing."""
    values = [number(row, name) for row in rows]
    return [value for value in values if value is not None] if None not in values else []


def _category_reversed(history: History) -> str:
    """Find a category or source whose rejected responses have the higher reward, beyond chance, and no less so."""
    rows, before = history.held_out.get(history.step, []), history.held_out.get(0, [])
    if not history.step or (mean_of(rows, _ACCURACY) or 0) < 0.5:
        return ""
    groups = [(label, name, group) for label in LABELS for name, group in _groups(rows, label)]
    margins = {(label, name): mean_of(group, _MARGIN) for label in LABELS for name, group in _groups(before, label)}
    bound = NormalDist().inv_cdf(1 - _FALSE_ALARMS / max(1, len(groups)))
    for label, name, group in groups:
        accuracy, margin = mean_of(group, _ACCURACY), mean_of(group, _MARGIN)
        if accuracy is None or margin is None or len(group) < _LEAST_PAIRS:
            continue
        if (0.5 - accuracy) * 2 * math.sqrt(len(group)) > bound and margin < min(0, margins.get((label, name)) or 0):
            return f"{label} `{name}`: accuracy {100 * accuracy:.0f} %, margin {margin:+.3f}, {len(group)} pairs"
    return ""


def _groups(rows: list[Row], label: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group by a label, where there are several groups."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if name := row.get(label):
            groups.setdefault(str(name), []).append(row)
    return iter(sorted(groups.items()) if len(groups) > 1 else ())


_ACCURACY, _MARGIN = "rewards/accuracies", "rewards/margins"

HELD_OUT_CHECKS = (
    RunCheck(
        name="held_out_loss_rose",
        severity="error",
        title="the held-out loss is higher than before step 1",
        meaning="On pairs that it was not trained on, the model is worse than the one that the run began with.",
        remedies=(LOWER_RATE, FEWER_STEPS, KEEP_BEST, RAISE_BETA, TRAIN_ADAPTER, CHECK_DATA),
        when=(
            "it is above that before step 1 by more than 1 %, which rounding does not reach, at two evaluations in a "
            "row or at the last step"
        ),
        look=_loss_rose,
    ),
    RunCheck(
        name="held_out_accuracy_fell",
        severity="error",
        title="the held-out reward accuracy is lower than before step 1",
        meaning="On pairs that it was not trained on, the model prefers the rejected response more often than before.",
        remedies=(CHECK_DATA, LOWER_RATE, FEWER_STEPS),
        when=(
            "its 95 % interval ends below the accuracy before step 1, at two evaluations in a row or at the last step: "
            "chance seldom makes that"
        ),
        look=_accuracy_fell,
    ),
    RunCheck(
        name="overfitting",
        severity="warning",
        title="the held-out loss rises again while the training loss falls",
        meaning="The policy learns its training pairs by heart; what it learns does not hold for other pairs any more.",
        remedies=(
            FEWER_STEPS,
            KEEP_BEST,
            LOWER_RATE,
            RAISE_BETA,
            CHECK_DATA,
        ),
        when=(
            "at two evaluations in a row the held-out loss is above its lowest by a tenth of what it had gained until "
            "then, and by 1 % of the loss before step 1; the training loss fell meanwhile. A single evaluation, or a "
            "smaller rise, comes and goes"
        ),
        look=_overfitting,
    ),
    RunCheck(
        name="category_reversed",
        severity="warning",
        title="rejected responses have the higher reward in a part of the held-out pairs",
        meaning="Labels of that part are swapped, or say the contrary of the others, which are more.",
        remedies=(
            plain("look at its pairs (`dpo eval`, which lists figures by source and category)"),
            plain("leave the part out, or train on it alone"),
        ),
        when=(
            "of a source or category of at least 10 held-out pairs, so few are right that chance makes that in one of "
            "100 runs, and its mean margin is below 0 and no better than before step 1, though all pairs together are "
            "right by half or more"
        ),
        look=_category_reversed,
    ),
)
"""All that is looked for, the gravest first."""
