"""Metrics as sums and counts: added up over micro-batches and ranks, reduced once, then divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

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
"""What is known of every pair; a metric of this name is its mean over pairs."""

TIE = 1e-4
"""Rewards or log-probabilities this near are equal: rounding alone makes such a difference."""


def pair_values(
    losses: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """Return `[B, 9]` in float64, in the order of `PAIR_METRICS`; each argument is `[B]`.

    An accuracy is 1 where the chosen response is ahead, ½ where they tie, else 0: by reward, by log-probability, and
    by its mean over the response's tokens.
    """
    margins = chosen_rewards - rejected_rewards
    columns = (
        losses,
        chosen_rewards,
        rejected_rewards,
        margins,
        _accuracies(margins),
        chosen_logps,
        rejected_logps,
        _accuracies(chosen_logps - rejected_logps),
        _accuracies(chosen_logps / chosen_lengths - rejected_logps / rejected_lengths),
    )
    return torch.stack([column.detach().double() for column in columns], dim=1)


def _accuracies(margins: Tensor) -> Tensor:
    """Return 1 where a margin is above 0, ½ where it is a tie, else 0; `[B]`."""
    return torch.where(margins.abs() <= TIE, 0.5, (margins > 0).double())


class StepSums:
    """What one rank adds up over the micro-batches of a step.

    Args:
        device: Where the sums are kept until they are reduced.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(PAIR_METRICS) + 3, dtype=dtype, device=device)

    def add(self, values: Tensor, num_tokens: int) -> None:
        """Add a micro-batch: its `pair_values`, `[B, 9]`, and its tokens."""
        self._sums[:-3] += values.sum(0)
        self._sums[-3] += len(values)
        self._sums[-2] += num_tokens

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was asked to stop."""
        self._sums[-1] += 1

    def reduce(self, accelerator: Accelerator) -> tuple[dict[str, float], int, bool]:
        """Add the ranks' sums together, once; return means, tokens, and whether any rank should stop."""
        total = accelerator.reduce(self._sums, reduction="sum").tolist()
        *sums, num_pairs, num_tokens, stops = total
        means = {name: value / num_pairs for name, value in zip(PAIR_METRICS, sums, strict=True)}
        return means, int(num_tokens), stops > 0
