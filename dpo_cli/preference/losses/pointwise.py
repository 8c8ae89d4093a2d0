"""Losses in which a response counts by itself, and not only by its difference to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from dpo_cli.preference.losses.base import Beta, LossSettings, ScoredPairs, Statistics, ls

if TYPE_CHECKING:
    from torch import Tensor


class NCA(LossSettings):
    """Noise Contrastive Alignment: raises the chosen response's own likelihood, not the difference alone.

    Use: the chosen response should not become less likely, as in reasoning or code.
    Watch: βc has its target at log 2; beyond it margins grow only through rejected responses. The loss begins at
    2 log 2.
    Takes: sums
    Source: Chen et al. 2024, arXiv 2402.05369, for two responses.
    """

    type: Literal["nca"] = "nca"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(βc) − ½·ls(−βc) − ½·ls(−βr)."""
        x, y = self.beta * pairs.c, self.beta * pairs.r
        return -ls(x) - ls(-x) / 2 - ls(-y) / 2


class BCO(LossSettings):
    """Binary Classifier Optimization: classifies each response by itself as chosen or rejected.

    δ is the mean reward of a response, averaged over the steps before; evaluations use 0.

    Use: responses that are good or bad by themselves, such as thumbs up and down, rather than better than another.
    Watch: δ changes, so the losses of two steps are not quite comparable: follow the margins. It begins at 2 log 2. The
    paper's weights for prompts that differ between good and bad responses are not included.
    Takes: sums
    Source: Jung et al. 2024, arXiv 2404.04656.
    """

    type: Literal["bco"] = "bco"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    running_mean: bool = True
    """Whether rewards are compared with their running mean; else with 0."""

    @property
    def keeps_statistics(self) -> bool:
        """Whether there is a running mean."""
        return self.running_mean

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(βc − δ) − ls(−(βr − δ))."""
        delta = pairs.step.statistics.get("reward", 0.0)
        return -ls(self.beta * pairs.c - delta) - ls(delta - self.beta * pairs.r)

    def after_step(self, statistics: Statistics, means: Mapping[str, float]) -> Statistics:
        """Take the step's mean reward into the mean over all steps."""
        if not self.running_mean:
            return statistics
        steps = statistics.get("steps", 0.0) + 1
        reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
        before = statistics.get("reward", 0.0)
        return {"steps": steps, "reward": before + (reward - before) / steps}


class SPPO(LossSettings):
    """Self-Play Preference Optimization with certain labels: the target of c is 1/(2β), that of r −1/(2β).

    Use: pairs sampled from the policy itself and ranked anew in every round.
    Watch: at the default β the targets are 500 nats away, so losses are huge, gradients are always clipped, and the
    learning rate alone decides how fast it learns. The same β makes rewards small: closer than 1e-4 is a tie.
    Takes: sums
    Source: Wu et al. 2024, arXiv 2405.00675, equation 4.7, its η being 1/β, with probabilities 1 and 0.
    """

    type: Literal["sppo"] = "sppo"
    """Which loss."""
    beta: Beta = 1e-3
    """The target of a log-ratio is 1 / (2β)."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """(c − 1/(2β))² + (r + 1/(2β))²."""
        target = 1 / (2 * self.beta)
        return (pairs.c - target).square() + (pairs.r + target).square()


class APOZero(LossSettings):
    """Anchored Preference Optimization: chosen becomes likelier, rejected less likely, each by itself.

    For chosen responses that are better than what the model would write.

    Use: chosen responses that are better than the model's own.
    Watch: it makes chosen responses likelier even where they are no better. Its slopes vanish at both ends, so pairs
    with a very negative margin have little gradient.
    Takes: sums
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.
    """

    type: Literal["apo_zero"] = "apo_zero"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """1 − σ(βc) + σ(βr)."""
        return 1 - (self.beta * pairs.c).sigmoid() + (self.beta * pairs.r).sigmoid()


class APODown(LossSettings):
    """Anchored Preference Optimization: chosen becomes less likely, rejected still less.

    For chosen responses that are worse than what the model would write.

    Use: chosen responses that are worse than the model's own, but better than the rejected ones.
    Watch: chosen responses become less likely by design: read what the model writes.
    Takes: sums
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.
    """

    type: Literal["apo_down"] = "apo_down"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""

    lowers_chosen: ClassVar[bool] = True

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """σ(βc) + 1 − σ(βΔ)."""
        return (self.beta * pairs.c).sigmoid() + 1 - (self.beta * pairs.delta).sigmoid()
