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

LENGTHS = ("chosen_tokens", "rejected_tokens")
"""What is known of a held-out pair besides: the scored tokens of both responses."""

REFERENCE_METRICS = (
    "reference_logps/chosen",
    "reference_logps/rejected",
    "reference_logps/accuracies",
    "reference_logps/accuracies_mean",
    "k3_forward/chosen",
    "k3_forward/rejected",
    "k3_reverse/chosen",
    "k3_reverse/rejected",
)
"""And what is known of it where there is a reference: its log-probabilities, and how far the policy is from it."""

_LARGEST_DIFFERENCE = 40.0
"""What a token's log π − log π_ref is clamped to, so that one token does not make a mean infinite."""


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


def held_out_names(*, reference: bool) -> tuple[str, ...]:
    """Return the names of a held-out pair's values, with a reference or without."""
    return (*PAIR_METRICS, *LENGTHS, *(REFERENCE_METRICS if reference else ()))


def held_out_values(policy: SequenceLogps, reference: SequenceLogps | None, tie: float) -> Tensor:
    """Return in float64 what is known of B held-out pairs beside the `pair_values`: `[B, 10]`, or `[B, 2]`.

    Of each response there are the sums over its tokens of e^d − 1 − d (forward) and e^(−d) − 1 + d (reverse), where
    d = log π − log π_ref. Over tokens that the reference would write, the mean of the former is KL(π_ref ‖ π); over
    tokens that the policy would, the mean of the latter is KL(π ‖ π_ref).

    Source: Schulman 2020, "Approximating KL divergence", the estimator k3.

    Args:
        policy: The policy's log-probabilities of B pairs.
        reference: The reference's, or None.
        tie: Log-probabilities this near are equal.
    """
    columns = [policy.chosen_lengths, policy.rejected_lengths]
    if reference is not None:
        chosen, rejected = reference.chosen, reference.rejected
        per_token = chosen / reference.chosen_lengths - rejected / reference.rejected_lengths
        columns += [chosen, rejected, _accuracies(chosen - rejected, tie), _accuracies(per_token, tie)]
        difference = (policy.tokens.detach().double() - reference.tokens.double()).clamp(
            -_LARGEST_DIFFERENCE, _LARGEST_DIFFERENCE
        )
        for d in (difference, -difference):
            columns += policy.responses.sums(d.expm1() - d).view(2, -1).unbind()
    return torch.stack([column.detach().double() for column in columns], dim=1)


def _accuracies(margins: Tensor, tie: float) -> Tensor:
    """Return 1 where a margin is above 0, ½ where it is a tie, else 0; `[B]`."""
    return torch.where(margins.abs() <= tie, 0.5, (margins > 0).double())
