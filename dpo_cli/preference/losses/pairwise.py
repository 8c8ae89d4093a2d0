"""Losses of Δ, by how much the chosen response is ahead of the rejected one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpo_cli.preference.losses.base import (
    Beta,
    LogRatios,
    LossSettings,
    MarginLossSettings,
    ScoredPairs,
    Smoothing,
    Statistics,
    StepInfo,
    logistic,
    ls,
    sum_log_ratios,
)
from dpo_cli.preference.losses.divergences import Divergence, ReverseKL
from dpo_cli.settings import Settings, contradiction

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.logps import SequenceLogps


class AdaptiveBeta(Settings):
    """A β for each step, larger where its margin is above the average of the steps before.

    β of a step = β · (1 + α · (mean reward margin of its pairs − M₀)), M₀ a moving average of those means, clamped
    to β / 1,000 … 100. Step 1 and evaluations use β itself.

    Use: pairs of mixed quality, some with a clear winner and some without.
    Watch: the mean over a few pairs is noisy: use many pairs per step.
    Source: β-DPO, Wu et al. 2024, arXiv 2407.08639.
    """

    alpha: float = Field(0.6, gt=0, le=10)
    """α: how strongly β follows the margin."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """How much of the moving average M₀ stays at every step."""


class DPO(MarginLossSettings):
    """Direct Preference Optimization: a logistic loss on the difference of the two log-ratios.

    Use: the first choice for pairs, and the baseline for the others.
    Watch: it depends on the difference alone, so both responses may become less likely while it falls (see
    `logps/chosen`): add `sft`, or use `dpop` or `nca`. On clean labels Δ grows without bound: train few epochs with a
    small learning rate, or use `ipo`.
    Takes: sums, or means by `logps`
    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; with `label_smoothing` the conservative variant
    (Mitchell 2023); with `logps: mean` the length-normalised variant (Tülu 3, arXiv 2411.15124).
    """

    type: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference: 0.01 to 0.5 for sums, 2 to 10 for means."""
    label_smoothing: Smoothing = 0.0
    """ε: the share of labels that are assumed to be swapped (conservative DPO)."""
    logps: Literal["sum", "mean"] = "sum"
    """Whether a response's log-probability is the sum over its tokens or their mean."""
    divergence: Divergence = ReverseKL()
    """What keeps the policy near the reference; only reverse_kl can be used with means."""
    adaptive_beta: AdaptiveBeta | None = None
    """null: the same β for every step; else β-DPO."""

    @property
    def compares_pairs(self) -> bool:
        """Whether β depends on all pairs of the step."""
        return self.adaptive_beta is not None

    @property
    def keeps_statistics(self) -> bool:
        """Whether β depends on the steps before."""
        return self.adaptive_beta is not None

    @property
    def fits_probability(self) -> bool:
        """Whether it compares βΔ itself, and takes labels as they are."""
        itself = self.divergence.type == "reverse_kl" and not self.uses_margins and self.adaptive_beta is None
        return itself and self.label_smoothing == 0

    @model_validator(mode="after")
    def _check(self) -> DPO:
        if self.logps == "mean" and self.divergence.type != "reverse_kl":
            what = f"`divergence: {self.divergence.type}` is not defined for `logps: mean`"
            raise contradiction(what, "set `logps: sum`, or leave `divergence` out", "divergence", "logps")
        return self

    @property
    def takes_means(self) -> bool:
        """By `logps`."""
        return self.logps == "mean"

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−(1−ε)·ls(βΔ − m) − ε·ls(−βΔ + m), m = `margin_scale` · the pair's margin in the data; 0 where it is null."""
        z = self._beta(pairs.delta, pairs.step) * pairs.difference(self.divergence) - self.margins(pairs.step)
        return logistic(z, self.label_smoothing)

    def _beta(self, delta: Tensor, step: StepInfo) -> float | Tensor:
        """Return the step's β."""
        if self.adaptive_beta is None or "margin" not in step.statistics:
            return self.beta
        excess = self.beta * delta.detach().mean().double() - step.statistics["margin"]
        # A step of bad pairs must not make β negative.
        return (self.beta * (1 + self.adaptive_beta.alpha * excess).clamp(min=1e-3)).clamp(max=100.0)

    def after_step(self, statistics: Statistics, means: Mapping[str, float]) -> Statistics:
        """M₀ ← m·M₀ + (1−m)·mean reward margin; the first step's margin begins it."""
        if self.adaptive_beta is None:
            return statistics
        m, margin = self.adaptive_beta.momentum, means["rewards/margins"]
        return {"margin": m * statistics.get("margin", margin) + (1 - m) * margin}


class Robust(LossSettings):
    """DPO, unbiased where a known share of the labels is wrong.

    Use: a share of the labels is flipped at random, and that share is known or well estimated.
    Watch: it has no lower bound and its slope never vanishes, so Δ grows as long as training continues; near ε = ½
    the division amplifies noise.
    Takes: sums
    Source: Chowdhury et al. 2024, arXiv 2403.00409.
    """

    type: Literal["robust"] = "robust"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    label_smoothing: Smoothing = 0.1
    """ε: the share of wrong labels."""
    divergence: Divergence = ReverseKL()
    """What keeps the policy near the reference."""

    @property
    def fits_probability(self) -> bool:
        """Whether it compares βΔ itself, and takes labels as they are."""
        return self.divergence.type == "reverse_kl" and self.label_smoothing == 0

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """[−(1−ε)·ls(βΔ) + ε·ls(−βΔ)] / (1−2ε)."""
        z, epsilon = self.beta * pairs.difference(self.divergence), self.label_smoothing
        return (-(1 - epsilon) * ls(z) + epsilon * ls(-z)) / (1 - 2 * epsilon)


class IPO(LossSettings):
    """Identity Preference Optimization: Δ has a finite target instead of growing without bound.

    Use: few pairs, or labels so clean that Δ would grow without bound under a logistic loss.
    Watch: a small β is a distant target: with means and β = 0.1 it is 5 nats per token. The loss begins at 1/(4β²), and
    a pair beyond the target is pulled back.
    Takes: sums or means, by `logps`
    Source: Azar et al. 2023, arXiv 2310.12036, equation 17; its τ is β here. The authors' results use means over the
    tokens.
    """

    type: Literal["ipo"] = "ipo"
    """Which loss."""
    beta: Beta = 0.1
    """The target of the difference is 1 / (2β)."""
    logps: Literal["sum", "mean"] = "mean"
    """Whether a response's log-probability is the sum over its tokens or their mean."""

    @property
    def takes_means(self) -> bool:
        """By `logps`."""
        return self.logps == "mean"

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """(Δ − 1/(2β))²."""
        return (pairs.delta - 1 / (2 * self.beta)).square()


class Hinge(LossSettings):
    """A linear loss up to a margin of 1 in βΔ, and 0 beyond it.

    Use: pairs whose margin is large enough should have no more influence.
    Watch: a pair with Δ above 1/β has no gradient; once all pairs are there, nothing more is learned.
    Takes: sums
    Source: SLiC, Zhao et al. 2023, arXiv 2305.10425, with the log-ratios of RSO, Liu et al. 2023, arXiv 2309.06657.
    """

    type: Literal["hinge"] = "hinge"
    """Which loss."""
    beta: Beta = 0.1
    """The inverse of the margin."""
    divergence: Divergence = ReverseKL()
    """What keeps the policy near the reference."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """max(0, 1 − βΔ)."""
        return (1 - self.beta * pairs.difference(self.divergence)).relu()


class EXO(LossSettings):
    """The reverse KL divergence from the policy's preferences to the labels.

    Use: the policy should concentrate on clearly preferred responses rather than cover all of them.
    Watch: it has its minimum at βΔ = log((1−ε)/ε), 6.9 by default, and a pair with a very negative margin has
    little gradient.
    Takes: sums
    Source: Ji et al. 2024, arXiv 2402.00856, equation 16.
    """

    type: Literal["exo"] = "exo"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    label_smoothing: float = Field(1e-3, ge=1e-6, lt=0.5)
    """ε: the probability that the labels give to the rejected response."""
    divergence: Divergence = ReverseKL()
    """What keeps the policy near the reference."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """σ(βΔ)·[ls(βΔ) − log(1−ε)] + σ(−βΔ)·[ls(−βΔ) − log ε]."""
        z, epsilon = self.beta * pairs.difference(self.divergence), self.label_smoothing
        chosen = z.sigmoid() * (ls(z) - math.log1p(-epsilon))
        return chosen + (-z).sigmoid() * (ls(-z) - math.log(epsilon))


class DiscoPOP(LossSettings):
    """A blend of logistic and exponential loss, proposed by a language model.

    Use: comparison with the paper.
    Watch: it is not convex. At the default τ it has a local minimum at βΔ = −0.12 and decreases for good only above
    βΔ = 0.07; at 0, where training begins, it increases with the margin.
    Takes: sums
    Source: Lu et al. 2024, arXiv 2406.08414, equation 5.
    """

    type: Literal["discopop"] = "discopop"
    """Which loss."""
    beta: Beta = 0.05
    """How strongly the policy is kept near the reference."""
    tau: float = Field(0.05, ge=1e-3, le=1)
    """τ: how sharply the blend changes from one to the other."""
    divergence: Divergence = ReverseKL()
    """What keeps the policy near the reference."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """(1−m)·(−ls(βΔ)) + m·e^(−βΔ), m = σ(βΔ/τ)."""
        z = self.beta * pairs.difference(self.divergence)
        # m·e^(−z) as one exponential, since e^(−z) alone overflows where m vanishes.
        return (-z / self.tau).sigmoid() * -ls(z) + (ls(z / self.tau) - z).exp()


class DPOP(LossSettings):
    """DPO-Positive: a penalty where the chosen response becomes less likely than under the reference.

    Use: responses that differ in a few tokens only, as in mathematics, where `dpo` makes the chosen one less likely.
    Watch: λ is multiplied by β: at 50, a nat lost by chosen weighs as much as 50 nats of Δ. At 0 it is `dpo`.
    Takes: sums
    Source: Smaug, Pal et al. 2024, arXiv 2402.13228.
    """

    type: Literal["dpop"] = "dpop"
    """Which loss."""
    beta: Beta = 0.3
    """How strongly the policy is kept near the reference."""
    penalty: float = Field(50.0, ge=0, le=1000)
    """λ: the weight of the penalty."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(β(Δ − λ·max(0, −c)))."""
        return -ls(self.beta * (pairs.delta - self.penalty * (-pairs.c).relu()))


class RDPO(LossSettings):
    """DPO for a reward from which every token of length is subtracted.

    To maximise r − α|y|, the reward is β · log-ratio + α|y|: where chosen is longer, its length explains a part of the
    preference, and the pair moves the policy less.

    Use: chosen responses tend to be longer in your pairs, and the policy should not learn that.
    Watch: α applies to every token: at 0.01, 100 tokens weigh as much as βΔ = 1. The loss does not begin at log 2.
    Takes: sums and lengths
    Source: Park et al. 2024, arXiv 2403.19159.
    """

    type: Literal["r_dpo"] = "r_dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    alpha: float = Field(0.01, ge=0, le=10)
    """α: the reward of a token of length."""

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(βΔ + α(|y_c| − |y_r|))."""
        longer = pairs.policy.chosen_lengths - pairs.policy.rejected_lengths
        return -ls(self.beta * pairs.delta + self.alpha * longer)


class LDDPO(LossSettings):
    """Length-Desensitized DPO: tokens beyond the length of the shorter response count less.

    Use: as for `r_dpo`; here the tail of the longer response counts less.
    Watch: with α near 0 that tail is hardly trained, the end token included.
    Takes: token values, of the first tokens and of the others
    Source: Liu et al. 2024, arXiv 2409.06411.
    """

    type: Literal["ld_dpo"] = "ld_dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How strongly the policy is kept near the reference."""
    alpha: float = Field(0.5, ge=0, le=1)
    """α: the weight of such a token; 1 is DPO."""

    @property
    def fits_probability(self) -> bool:
        """It compares βΔ itself."""
        return True

    def log_ratios(self, policy: SequenceLogps, reference: SequenceLogps) -> LogRatios:
        """Weigh the tokens beyond the shorter response's length by α."""
        return sum_log_ratios(policy.desensitized(self.alpha), reference.desensitized(self.alpha))

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(βΔ), with log π(y) = the first min(|y_c|, |y_r|) tokens + α · the others."""
        return -ls(self.beta * pairs.delta)
