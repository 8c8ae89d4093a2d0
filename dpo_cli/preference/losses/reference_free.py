"""Losses that need no reference: c and r are the policy's own log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dpo_cli.preference.losses.base import Beta, LossSettings, ScoredPairs, ls

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(LossSettings):
    """Simple Preference Optimization: mean log-probabilities and a target margin, without a reference.

    Use: there is no memory or time for a reference, and length should not count.
    Watch: only a low learning rate keeps the policy near where it began: read what the model writes. What matters of γ
    is the ratio γ/β.
    Takes: means
    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """

    type: Literal["simpo"] = "simpo"
    """Which loss."""
    beta: Beta = 2.0
    """The scale of the mean log-probabilities."""
    gamma: float = Field(1.0, ge=0, le=100)
    """γ: the margin by which chosen should exceed rejected."""

    needs_reference: ClassVar[bool] = False

    @property
    def takes_means(self) -> bool:
        """It compares means."""
        return True

    @property
    def fits_probability(self) -> bool:
        """Whether it compares βΔ itself."""
        return self.gamma == 0

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(β(log π(y_c)/|y_c| − log π(y_r)/|y_r|) − γ)."""
        return -ls(self.beta * pairs.delta - self.gamma)


class ORPO(LossSettings):
    """Odds Ratio Preference Optimization: supervised fine-tuning and a preference term in one, without a reference.

    Use: a base model, in one stage instead of fine-tuning before.
    Watch: at the default λ it is mostly fine-tuning: chosen responses must be worth imitating; use a learning rate for
    fine-tuning.
    Takes: means, and the mean over the step's chosen tokens
    Source: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7.
    """

    type: Literal["orpo"] = "orpo"
    """Which loss."""
    beta: Beta = 0.1
    """λ: the weight of the odds ratio."""

    needs_reference: ClassVar[bool] = False

    @property
    def takes_means(self) -> bool:
        """It compares means."""
        return True

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """NLL of chosen − λ·ls(log odds of chosen − log odds of rejected), odds = p/(1−p), p = e^(mean log π)."""
        odds_ratio = pairs.delta - (_log_one_minus_exp(pairs.c) - _log_one_minus_exp(pairs.r))
        return pairs.chosen_nll - self.beta * ls(odds_ratio)


class CPO(LossSettings):
    """Contrastive Preference Optimization: DPO against a uniform reference, and the chosen response's likelihood.

    Use: chosen responses are near-perfect, such as good translations, and there is no reference.
    Watch: it compares sums without a reference, so a longer response is less likely by its length alone. At α = 0
    nothing holds the policy.
    Takes: sums, and the mean over the step's chosen tokens
    Source: Xu et al. 2024, arXiv 2401.08417.
    """

    type: Literal["cpo"] = "cpo"
    """Which loss."""
    beta: Beta = 0.1
    """The scale of the log-probabilities."""
    alpha: float = Field(1.0, ge=0, le=1000)
    """α: the weight of the chosen response's negative log-likelihood."""

    needs_reference: ClassVar[bool] = False

    @property
    def fits_probability(self) -> bool:
        """Whether nothing but βΔ counts."""
        return self.alpha == 0

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−ls(β(log π(y_c) − log π(y_r))) + α·NLL of chosen."""
        return -ls(self.beta * pairs.delta) + self.alpha * pairs.chosen_nll


class SFT(LossSettings):
    """Supervised fine-tuning on the chosen responses, to be added to another loss.

    Use: together with a preference loss under which the chosen response becomes less likely.
    Watch: alone it is fine-tuning on chosen responses; rejected ones are ignored.
    Takes: the mean over the step's chosen tokens
    Source: the negative log-likelihood, a mean over all chosen tokens of the step.
    """

    type: Literal["sft"] = "sft"
    """Which loss."""

    needs_reference: ClassVar[bool] = False
    uses_rejected: ClassVar[bool] = False

    @property
    def takes_means(self) -> bool:
        """It compares means."""
        return True

    def losses(self, pairs: ScoredPairs) -> Tensor:
        """−log π(y_c) / |y_c|, over all tokens of the step."""
        return pairs.chosen_nll


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 − e^x) for x ≤ 0; next to 0, where it is −∞ and no float has an answer, a finite value."""
    return (-x.clamp(max=-1e-6).expm1()).log()
