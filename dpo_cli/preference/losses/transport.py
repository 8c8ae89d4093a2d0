"""Losses that compare the pairs of a step with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from dpo_cli.preference.losses.base import Beta, LossSettings, ScoredPairs, Smoothing, logistic

if TYPE_CHECKING:
    from torch import Tensor


class AOT(LossSettings):
    """Alignment via Optimal Transport: the policy's preferences as a whole should exceed the reference's.

    The differences log π(chosen) − log π(rejected) of a step are sorted, as are those of the reference, and compared
    by rank.

    Use: preferences that hold for the data as a whole rather than pair by pair.
    Watch: ranks among a few pairs say little: use many pairs per step. A step of several micro-batches takes two
    forward passes for each. The loss logged for a pair is that of its rank.
    Takes: sums
    Source: Melnyk et al. 2024, arXiv 2406.05882, the paired variant.
    """

    type: Literal["aot"] = "aot"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    label_smoothing: Smoothing = 0.0
    """ε: the share of wrong labels."""

    @property
    def compares_pairs(self) -> bool:
        """It sorts all pairs of the step."""
        return True

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−(1−ε)·ls(βδ) − ε·ls(−βδ), δ = the policy's k-th difference − the reference's k-th."""
        of_policy, order = (pairs.policy.chosen - pairs.policy.rejected).sort()
        delta = of_policy - (pairs.reference.chosen - pairs.reference.rejected).sort().values
        # Each pair gets the loss of its own rank.
        return logistic(self.beta * delta, self.label_smoothing)[order.argsort()]


class AOTUnpaired(LossSettings):
    """Alignment via Optimal Transport without pairs: chosen responses as a whole should exceed rejected ones.

    The log-ratios of a step's chosen responses are sorted, as are those of its rejected ones, and compared by rank.

    Use: chosen and rejected responses that are unrelated, or answer different prompts.
    Watch: as for `aot`: use many pairs per step; several micro-batches take two forward passes each.
    Takes: sums
    Source: Melnyk et al. 2024, arXiv 2406.05882, the unpaired variant.
    """

    type: Literal["aot_unpaired"] = "aot_unpaired"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    label_smoothing: Smoothing = 0.0
    """ε: the share of wrong labels."""

    takes_weights: ClassVar[bool] = False

    @property
    def compares_pairs(self) -> bool:
        """It sorts all responses of the step."""
        return True

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−(1−ε)·ls(βδ) − ε·ls(−βδ), δ = the k-th c − the k-th r."""
        sorted_c, order = pairs.c.sort()
        losses = logistic(self.beta * (sorted_c - pairs.r.sort().values), self.label_smoothing)
        # A pair gets the loss of its chosen response's rank.
        return losses[order.argsort()]
