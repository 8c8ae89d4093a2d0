"""What held-out pairs say of a model: one entry of `FIGURES` for each number, from its name to how it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_cli.data.checkup.intervals import wilson_interval

if TYPE_CHECKING:
    from dpo_cli.evaluation.evaluate import PairResult

Columns = Mapping[str, Sequence[float]]
"""The values of all held-out pairs, in their order, by the name of the pair's metric."""


@dataclass(frozen=True)
class Figure:
    """A number about all held-out pairs, or about a group of them.

    Attributes:
        key: Its name in metrics.jsonl and in the JSON of `dpo eval`.
        title: Its row in tables; one that is indented belongs to the row above.
        compute: From the values of at least one pair to its own.
        show: Writes its value.
        of_groups: Whether the tables of groups have it.
    """

    key: str
    title: str
    compute: Callable[[Columns], Any]
    show: Callable[[Any], str]
    of_groups: bool = False

    def cell(self, figures: Mapping[str, Any]) -> str:
        """Write it out of the `figures` of a model; a dash where an earlier version of the program wrote them."""
        return self.show(figures[self.key]) if self.key in figures else "–"


def _mean(name: str, title: str, show: Callable[[float], str], *, of_groups: bool = False) -> Figure:
    """Return the mean of a metric of pairs."""
    return Figure(name, title, lambda columns: _mean_of(columns[name]), show, of_groups)


def _mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ties(columns: Columns) -> int:
    return sum(value == 0.5 for value in columns["rewards/accuracies"])


def _interval(columns: Columns) -> list[float]:
    """Return the 95 % interval of the reward accuracy: one pair is one trial."""
    accuracies = columns["rewards/accuracies"]
    return list(wilson_interval(_mean_of(accuracies), len(accuracies)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shown_interval(bounds: Sequence[float]) -> str:
    """Write the lower and the upper end of the interval of a share."""
    return "{:.1f} – {:.1f} %".format(*(100 * bound for bound in bounds))


def _signed(reward: float) -> str:
    """Write a reward with its sign; what rounds to nothing has none."""
    rounded = round(reward, 4)
    return f"{rounded:+.4f}" if rounded else "0.0000"


FIGURES = (
    Figure("pairs", "pairs", lambda columns: len(columns["loss"]), str),
    _mean("loss", "loss", "{:.4f}".format, of_groups=True),
    _mean("rewards/accuracies", "reward accuracy", _percent, of_groups=True),
    Figure(
        "accuracy_interval",
        "  95 % interval",
        _interval,
        shown_interval,
        of_groups=True,
    ),
    Figure("ties", "  ties (counted half)", _ties, str),
    _mean("rewards/margins", "reward margin", _signed, of_groups=True),
    _mean("rewards/chosen", "reward of chosen", _signed),
    _mean("rewards/rejected", "reward of rejected", _signed),
    _mean("logps/chosen", "log-probability of chosen", "{:.2f}".format),
    _mean("logps/rejected", "log-probability of rejected", "{:.2f}".format),
    _mean("logps/accuracies", "chosen likelier (sum)", _percent),
    _mean("logps/accuracies_mean", "chosen likelier (mean per token)", _percent),
)
"""All figures, in the order in which they are shown and written."""


def figures(results: Sequence[PairResult]) -> dict[str, Any]:
    """Return the value of each of `FIGURES` over at least one result, by its key."""
    columns = {name: [result.metrics[name] for result in results] for name in results[0].metrics}
    return {figure.key: figure.compute(columns) for figure in FIGURES}


def figures_by(
    results: Sequence[PairResult],
    labels: Sequence[str],
    told: Callable[[Sequence[PairResult]], dict[str, Any]] = figures,
) -> dict[str, dict[str, Any]]:
    """Return the figures of each group of results, in the order of the groups' names.

    Args:
        results: At least one.
        labels: The name of each result's group; empty where it is in none.
        told: Returns the figures of a group.

    Returns:
        Nothing where the results are of one group, which says no more than all of them together.
    """
    groups: dict[str, list[PairResult]] = {}
    for result, label in zip(results, labels, strict=True):
        groups.setdefault(label, []).append(result)
    return {label: told(groups[label]) for label in sorted(groups)} if len(groups) > 1 else {}
