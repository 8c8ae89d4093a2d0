"""Per-pair results become figures, with an interval where one pair is one trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dpo_cli.data.checkup.intervals import wilson_interval
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.preference.metrics import PAIR_METRICS


def figures(results: Sequence[PairResult]) -> dict[str, Any]:
    """Return the number of pairs and ties, every metric's mean, and the accuracy's 95 % interval."""
    columns = {name: [result.metrics[name] for result in results] for name in PAIR_METRICS}
    means = {name: math.fsum(values) / len(values) for name, values in columns.items()}
    interval = wilson_interval(means["rewards/accuracies"], len(results))
    ties = sum(value == 0.5 for value in columns["rewards/accuracies"])
    return {"pairs": len(results), "ties": ties, **means, "accuracy_interval": list(interval)}


def figures_by(results: Sequence[PairResult], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the figures of each group of results, in the order of the groups' names.

    Args:
        results: At least one.
        labels: The name of each result's group; empty where it is in none.

    Returns:
        Nothing where the results are of one group, which says no more than all of them together.
    """
    groups: dict[str, list[PairResult]] = {}
    for result, label in zip(results, labels, strict=True):
        groups.setdefault(label, []).append(result)
    return {label: figures(groups[label]) for label in sorted(groups)} if len(groups) > 1 else {}
