"""What `dpo eval` tells beside the figures: baselines, the part of length, calibration, distance from the reference.

One entry of `DETAILS` for each key of the JSON. Where one cannot be computed, it is an object with the reason alone:
`missing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cli.evaluation.baselines import baselines, by_length, by_margin, length_controlled
from dpo_cli.evaluation.calibration import calibration
from dpo_cli.evaluation.figures import figures
from dpo_cli.evaluation.shares import Columns

if TYPE_CHECKING:
    from dpo_cli.evaluation.evaluate import PairResult
    from dpo_cli.preference.objective import Objective


@dataclass(frozen=True)
class Detail:
    """Several numbers about all held-out pairs, or about a group of them.

    Attributes:
        key: Their name in the JSON of `dpo eval`.
        compute: From the values of at least one pair, and what was minimised.
    """

    key: str
    compute: Callable[[Columns, Objective], Any]


def from_reference(columns: Columns, objective: Objective) -> dict[str, Any]:
    """Return how far the policy is from the reference, in nats per token, on the tokens of each kind of response.

    `log_ratio` is the mean of d = log π − log π_ref, `forward_k3` that of e^d − 1 − d and `reverse_k3` that of
    e^(−d) − 1 + d. As estimates of KL(π_ref ‖ π) and KL(π ‖ π_ref) the latter two presume tokens from π_ref and from π.
    """
    if not objective.needs_reference:
        return {"missing": "there is no reference"}
    found = {}
    for side in ("chosen", "rejected"):
        sums = {
            "log_ratio": columns[f"logps/{side}"] - columns[f"reference_logps/{side}"],
            "forward_k3": columns[f"k3_forward/{side}"],
            "reverse_k3": columns[f"k3_reverse/{side}"],
        }
        tokens = math.fsum(columns[f"{side}_tokens"])
        found[side] = {"tokens": int(tokens), **{name: math.fsum(values) / tokens for name, values in sums.items()}}
    return found


def _calibration(columns: Columns, objective: Objective) -> dict[str, Any]:
    """Return the calibration of σ(βΔ), under losses that fit it to a probability."""
    if not objective.fits_probability:
        name = objective.reward_source.type
        return {"missing": f"the loss `{name}`, as it is set, does not fit σ(βΔ) to the probability of a preference"}
    return calibration(columns["rewards/margins"], columns["rewards/accuracies"])


DETAILS = (
    Detail("baselines", lambda columns, _: baselines(columns)),
    Detail("length_controlled", lambda columns, _: length_controlled(columns)),
    Detail("by_margin", lambda columns, _: by_margin(columns)),
    Detail("by_length", lambda columns, _: by_length(columns)),
    Detail("calibration", _calibration),
    Detail("from_reference", from_reference),
)
"""All details, in the order in which they are written."""


def details(results: Sequence[PairResult], objective: Objective) -> dict[str, Any]:
    """Return each of `DETAILS` over at least one result, by its key."""
    columns = {name: np.array([result.metrics[name] for result in results]) for name in results[0].metrics}
    return {detail.key: detail.compute(columns, objective) for detail in DETAILS}


def figures_and_details(results: Sequence[PairResult], objective: Objective) -> dict[str, Any]:
    """Return all that `dpo eval` tells of at least one result, by its key."""
    return {**figures(results), **details(results, objective)}
