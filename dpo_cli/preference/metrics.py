"""The metrics of a pair: one value for each name, of which means are reported."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_cli.modeling.logps import SequenceLogps

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
    "logps/accuracies_mean",
)
"""The names of a pair's values; a metric of this name is their mean over pairs."""


def pair_values(
    losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, policy: SequenceLogps, tie: float
) -> Tensor:
    """Return `[B, 9]` in float64, in the order of `PAIR_METRICS`.

    An accuracy is 1 where the chosen response is ahead, ½ where they tie, else 0: by reward, by log-probability, and
    by its mean over the response's tokens.

    Args:
        losses: `[B]`.
        chosen_rewards: `[B]`.
        rejected_rewards: `[B]`.
        policy: The policy's log-probabilities of B pairs.
        tie: Rewards, or log-probabilities, this near are equal.
    """
    chosen_logps, rejected_logps = policy.chosen, policy.rejected
    margins = chosen_rewards - rejected_rewards
    columns = (
        losses,
        chosen_rewards,
        rejected_rewards,
        margins,
        _accuracies(margins, tie),
        chosen_logps,
        rejected_logps,
        _accuracies(chosen_logps - rejected_logps, tie),
        _accuracies(chosen_logps / policy.chosen_lengths - rejected_logps / policy.rejected_lengths, tie),
    )
    return torch.stack([column.detach().double() for column in columns], dim=1)


def _accuracies(margins: Tensor, tie: float) -> Tensor:
    """Return 1 where a margin is above 0, ½ where it is a tie, else 0; `[B]`."""
    return torch.where(margins.abs() <= tie, 0.5, (margins > 0).double())
