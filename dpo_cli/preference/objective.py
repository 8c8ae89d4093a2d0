"""What a run minimises: one loss, or several added up by their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.preference.losses import Loss
from dpo_cli.preference.losses.base import MarginLossSettings, PairLosses, Statistics, StepInfo

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.logps import SequenceLogps


@dataclass(frozen=True)
class Objective:
    """Losses and their sum.

    Attributes:
        losses: One at least; one of them at most keeps running statistics.
    """

    losses: tuple[Loss, ...]

    @classmethod
    def of(cls, losses: Loss | Sequence[Loss]) -> Objective:
        """Take one loss or several."""
        return cls(tuple(losses) if isinstance(losses, Sequence) else (losses,))

    @property
    def reward_source(self) -> Loss:
        """The loss whose rewards count: the one with statistics, else the first with a reference, else the first."""
        return max(self.losses, key=lambda loss: (loss.keeps_statistics, loss.needs_reference))

    @property
    def needs_reference(self) -> bool:
        """Whether any of them does."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def compares_pairs(self) -> bool:
        """Whether any of them has to see all pairs of a step at once."""
        return any(loss.compares_pairs for loss in self.losses)

    @property
    def wpo(self) -> bool:
        """Whether any of them weighs pairs by the policy's own probabilities."""
        return any(loss.wpo for loss in self.losses)

    @property
    def router_aux(self) -> float:
        """The coefficient of the load-balancing loss of the policy's routers; one of the losses at most sets it."""
        return max(loss.router_aux for loss in self.losses)

    @property
    def refuses_weights(self) -> str:
        """The type of a loss that belongs to no single pair, so that pairs cannot be weighted; empty: none."""
        return next((loss.type for loss in self.losses if not loss.takes_weights), "")

    @property
    def uses_margins(self) -> bool:
        """Whether any of them reads the margins in the data."""
        return any(loss.uses_margins for loss in self.losses)

    @property
    def use_of_margins(self) -> str:
        """How to let it use the margins in the data; empty: none of the losses can."""
        able = [loss.type for loss in self.losses if isinstance(loss, MarginLossSettings)]
        setting = "`loss.margin_scale`" if len(self.losses) == 1 else f"`margin_scale` of `{next(iter(able), '')}`"
        return f"set {setting} to use it" if able else ""

    @property
    def fits_probability(self) -> bool:
        """Whether σ of a reward margin is fitted to the probability that the chosen response is preferred."""
        return self.reward_source.fits_probability

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """Return the weighted sum of the losses of each pair, and the rewards of one of them."""
        results = [loss(policy, reference, step) for loss in self.losses]
        factors = [loss.weight * (_wpo_weights(policy) if loss.wpo else 1.0) for loss in self.losses]
        losses = [factor * result.losses for factor, result in zip(factors, results, strict=True)]
        rewards = results[self.losses.index(self.reward_source)]
        return PairLosses(sum(losses[1:], losses[0]), rewards.chosen_rewards, rewards.rejected_rewards)

    def after_step(self, statistics: Statistics, means: Mapping[str, float]) -> Statistics:
        """Return the statistics after a step, given those before and the means of its metrics."""
        return self.reward_source.after_step(statistics, means)

    def __str__(self) -> str:
        """Name them, with weights where there are several."""
        if len(self.losses) == 1 and math.isclose(self.losses[0].weight, 1):
            return self.losses[0].type
        return " + ".join(f"{loss.weight:g} · {loss.type}" for loss in self.losses)


def _wpo_weights(policy: SequenceLogps) -> Tensor:
    """Return the weight of each pair, `[B]`, without gradient: that of its chosen times that of its rejected response.

    A response's is exp(mean over its tokens of log π(token) − log Σ π²): 1 where the response is as likely as
    what the policy samples itself.

    Source: WPO, Zhou et al. 2024, arXiv 2406.11827, equation 2.
    """
    assert policy.log_collisions is not None, "the scorer was not asked for collisions"
    aligned = dataclasses.replace(policy, tokens=policy.tokens.detach() - policy.log_collisions)
    return (aligned.chosen / aligned.chosen_lengths + aligned.rejected / aligned.rejected_lengths).exp()
