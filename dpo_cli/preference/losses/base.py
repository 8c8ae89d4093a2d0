"""The base of all losses: their settings in common, the log-ratios that they compare, and the rewards."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.settings import Settings, contradiction

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.logps import SequenceLogps

Statistics = dict[str, float]
"""Running statistics that a loss keeps from step to step, by name; empty before step 1 and in evaluations."""

Beta = Annotated[float, Field(ge=1e-4, le=100)]
"""The range in which no loss overflows, whatever the log-ratios."""

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""The share of labels that are assumed to be swapped."""

LogRatios = tuple["Tensor", "Tensor"]
"""c and r of B pairs, `[B]` each."""


@dataclass(frozen=True)
class PairLosses:
    """Losses and rewards of B pairs.

    Attributes:
        losses: `[B]`, with gradient.
        chosen_rewards: `[B]`, βc, without gradient.
        rejected_rewards: `[B]`, βr, without gradient.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class StepInfo:
    """What a loss knows of a step beyond the pairs at hand, so that losses do not depend on how the step is cut.

    Attributes:
        num_pairs: Pairs of the whole step, over all ranks.
        chosen_tokens: Tokens of their chosen responses.
        margins: `[B]`, the margin that the data gives each pair at hand, or 0.
        statistics: Those that the loss kept of the steps before.
        tie: How near equal rewards are to each other, in the precision that is computed in.
    """

    num_pairs: int
    chosen_tokens: int
    margins: Tensor | float = 0.0
    statistics: Statistics = field(default_factory=dict)
    tie: float = PRECISIONS["float32"].tie


@dataclass(frozen=True)
class ScoredPairs:
    """B pairs as a loss sees them.

    Attributes:
        c: `[B]`, log π − log π_ref of the chosen responses; log π where the loss needs no reference.
        r: `[B]`, the same of the rejected ones.
        policy: The policy's log-probabilities.
        reference: The reference's.
        step: The step that they belong to.
    """

    c: Tensor
    r: Tensor
    policy: SequenceLogps
    reference: SequenceLogps
    step: StepInfo

    @property
    def delta(self) -> Tensor:
        """Δ = c − r, `[B]`."""
        return self.c - self.r

    def difference(self, divergence: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(c) − f(r), `[B]`, with the f of a divergence: Δ for the reverse KL."""
        return divergence(self.c) - divergence(self.r)

    @property
    def chosen_nll(self) -> Tensor:
        """Each pair's share, `[B]`, of the chosen responses' negative log-likelihood as a mean over tokens.

        The mean of all shares over the step's pairs is the mean over the step's tokens.
        """
        return -self.policy.chosen * (self.step.num_pairs / self.step.chosen_tokens)


class LossSettings(Settings):
    """The settings that every loss has, and what a run has to know of it."""

    weight: float = Field(1.0, gt=0)
    """The factor of this loss in a sum of several."""
    wpo: bool = False
    """Whether a pair is weighted by how likely its responses are under the policy (WPO), without an upper bound."""
    router_aux: float = Field(0.0, ge=0)
    """Coefficient of the load-balancing loss of a mixture of experts, added once, whatever `weight`; 0: left out."""

    needs_reference: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True
    uses_rejected: ClassVar[bool] = True
    lowers_chosen: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_wpo(self) -> Self:
        if self.wpo and self.compares_pairs:
            what = "`wpo` weights pairs one by one, but this loss compares the pairs of a step with each other"
            raise contradiction(what, "leave `wpo` out, or choose another loss", "wpo", "type")
        return self

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """Return losses and rewards of B pairs; a loss that needs no reference ignores it."""
        if not self.needs_reference:
            reference = dataclasses.replace(reference, tokens=reference.tokens.new_zeros(reference.tokens.shape))
        c, r = self.log_ratios(policy, reference)
        losses = self.losses(ScoredPairs(c, r, policy, reference, step))
        # A loss without β reports the log-probabilities themselves.
        beta = getattr(self, "beta", 1.0)
        return PairLosses(losses, (beta * c).detach(), (beta * r).detach())

    @abstractmethod
    def losses(self, pairs: ScoredPairs) -> Tensor:
        """Return the loss of each pair, `[B]`."""

    def log_ratios(self, policy: SequenceLogps, reference: SequenceLogps) -> LogRatios:
        """Return what the loss compares and rewards are made of: c and r of each pair, `[B]`."""
        return (mean_log_ratios if self.takes_means else sum_log_ratios)(policy, reference)

    @property
    def takes_means(self) -> bool:
        """Whether its log-ratios are means over a response's tokens instead of sums."""
        return False

    @property
    def compares_pairs(self) -> bool:
        """Whether it compares the pairs of a step with each other, and so has to see all of them at once."""
        return False

    @property
    def uses_margins(self) -> bool:
        """Whether it reads the margins in the data."""
        return False

    @property
    def fits_probability(self) -> bool:
        """Whether its mean is least where σ(βΔ) is the share of labels that prefer the response.

        Only then can σ of a reward margin be compared with how often held-out labels agree.
        """
        return False

    @property
    def keeps_statistics(self) -> bool:
        """Whether `after_step` keeps running statistics."""
        return False

    def after_step(self, statistics: Statistics, means: Mapping[str, float]) -> Statistics:
        """Return the statistics after a step, given those before and the means of its metrics."""
        return statistics


class MarginLossSettings(LossSettings):
    """The settings of a loss that can use the margins in the data."""

    margin_scale: float | None = Field(None, gt=0)
    """s: chosen's reward should exceed rejected's by s · the pair's margin in the data; null: margins are ignored."""

    @property
    def uses_margins(self) -> bool:
        """Whether margins have a scale."""
        return self.margin_scale is not None

    def margins(self, step: StepInfo) -> Tensor | float:
        """Return m of each pair, `[B]`, in units of the reward; 0 where margins are not used."""
        return 0.0 if self.margin_scale is None else self.margin_scale * step.margins


def sum_log_ratios(policy: SequenceLogps, reference: SequenceLogps) -> LogRatios:
    """Return c and r of each pair as sums over the response tokens."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def mean_log_ratios(policy: SequenceLogps, reference: SequenceLogps) -> LogRatios:
    """Return c and r of each pair as means over the response tokens."""
    c, r = sum_log_ratios(policy, reference)
    return c / policy.chosen_lengths, r / policy.rejected_lengths


def ls(x: Tensor) -> Tensor:
    """Return log σ(x), without overflow at either end."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def logistic(z: Tensor, epsilon: float) -> Tensor:
    """Return −(1−ε)·ls(z) − ε·ls(−z)."""
    return -(1 - epsilon) * ls(z) - epsilon * ls(-z)
