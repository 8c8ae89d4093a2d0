"""What is looked for in the step plan, before step 1; `PLAN_CHECKS` at the end lists it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_cli.evaluation.findings.facts import Domination
from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.history import History
from dpo_cli.evaluation.findings.remedies import plain

_DOMINATED = 0.9
"""The share of a window's pairs from which on a source dominates it."""

_SURE = 5.0
"""Standard deviations above its share of the data: in a million windows of shuffled pairs, one."""

_MOST_SOURCES = 20
"""Of how many sources, the largest, windows are counted: a smaller one fills none."""


def dominated(
    sources: NDArray[np.int64], names: Sequence[str], pairs_per_step: int, steps_of_window: int, num_steps: int
) -> Domination | None:
    """Return the first steps that have pairs of one source alone, though the data has others.

    Args:
        sources: The source of each training pair in the order of the first epoch, `[pairs]`, as an index into `names`.
        names: The sources.
        pairs_per_step: Pairs of a step.
        steps_of_window: Steps that are looked at together.
        num_steps: Steps of the run.
    """
    size, total = pairs_per_step * steps_of_window, len(sources)
    num_windows = min(total // size, num_steps // steps_of_window)
    counts = np.bincount(sources, minlength=len(names))
    for source in np.argsort(-counts, kind="stable")[:_MOST_SOURCES]:
        share = counts[source] / total
        bound = max(_DOMINATED, share + _SURE * math.sqrt(share * (1 - share) / size))
        windows = (sources == source)[: num_windows * size].reshape(num_windows, size).mean(axis=1)
        full = np.flatnonzero(windows >= bound) if share < 1 else windows[:0].astype(np.int64)
        if len(full):
            first = int(full[0])
            # As long as it goes on.
            last = first + int(np.argmin(np.append(windows[first:] >= bound, False))) - 1
            of_these = float(windows[first : last + 1].mean())
            steps = first * steps_of_window + 1, (last + 1) * steps_of_window
            return Domination(
                source=names[source], first_step=steps[0], last_step=steps[1], share=of_these, of_data=float(share)
            )
    return None


def _one_source(history: History) -> str:
    """Find neighbouring steps with pairs of one source alone, though the data has others."""
    found = history.facts.dominated
    if found is None:
        return ""
    return (
        f"{100 * found.share:.0f} % of the pairs of steps {found.first_step:,} to {found.last_step:,} are of "
        f"`{found.source}`, which has {100 * found.of_data:.0f} % of all"
    )


PLAN_CHECKS = (
    RunCheck(
        name="one_source",
        severity="warning",
        title="steps have pairs of one source alone",
        meaning="The policy learns one source after the other, and forgets the first while it learns the last.",
        remedies=(plain("set `training.shuffle: true`"), plain("mix the rows of the sources")),
        when=(
            "before step 1, by the plan of the first epoch: in a window of at least 64 pairs 90 % or more are of one "
            "source, which is 5 standard deviations above its share of the data; shuffled pairs do not come near"
        ),
        look=_one_source,
    ),
)
"""All that is looked for."""
