"""Every loss: one small frozen model each, its equation beside the line; `Loss` at the end lists them.

For a pair: c = log π(chosen) − log π_ref(chosen), r the same of rejected, Δ = c − r, ls = log σ, |y| the number of a
response's tokens. Logs of sequences are sums over the response tokens unless said. Where there is no reference, log
π_ref is 0. The loss of a step is the mean over its pairs.

The classes are settings as well, and are read before torch is needed: it is imported where it computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dpo_cli.preference.divergences import Divergence, ReverseKL
from dpo_cli.preference.terms import (
    Beta,
    LossSettings,
    MarginLossSettings,
    Memory,
    PairLosses,
    StepInfo,
    chosen_nll,
    log_ratios,
    ls,
    rewards,
)
from dpo_cli.settings import Settings, contradiction

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.logps import SequenceLogps

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


class AdaptiveBeta(Settings):
    """A β for each step, larger where its pairs are told apart more clearly than those before.

    β of a step = β · (1 + α · (mean reward margin of its pairs − M₀)), M₀ a moving average of those means, held
    between β / 1,000 and 100. Step 1 and evaluations take β itself.

    Use: pairs of mixed quality, some told apart at a glance and some hardly.
    Watch: the mean of a few pairs is noisy: it wants steps of many.
    Source: β-DPO, Wu et al. 2024, arXiv 2407.08639.
    """

    alpha: float = Field(0.6, gt=0, le=10)
    """α: how strongly β follows the margin."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """How much of the moving average M₀ stays at every step."""


class DPO(MarginLossSettings):
    """Direct Preference Optimization: a logistic loss on the difference of the two log-ratios.

    Use: the first choice for pairs, and what the others are measured against.
    Watch: it sees the difference alone, so both responses may become less likely while it falls (`logps/chosen` tells):
    add `sft`, or take `dpop` or `nca`. On clean labels it drives Δ on and on: few epochs, small steps, or `ipo`.
    Takes: sums, or means by `logps`
    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; with `label_smoothing` the conservative variant
    (Mitchell 2023); with `logps: mean` the length-normalised variant (Tülu 3, arXiv 2411.15124).
    """

    type: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference: 0.01 to 0.5 for sums, 2 to 10 for means."""
    label_smoothing: Smoothing = 0.0
    """Share of the labels that are taken to be the wrong way round (conservative DPO)."""
    logps: Literal["sum", "mean"] = "sum"
    """Whether a response's log-probability is the sum over its tokens or their mean."""
    divergence: Divergence = ReverseKL()
    """What holds the policy to the reference; others than reverse_kl only for sums."""
    adaptive_beta: AdaptiveBeta | None = None
    """null: the same β for every step; else β-DPO."""

    @property
    def looks_at_step(self) -> bool:
        """Whether β depends on all pairs of the step."""
        return self.adaptive_beta is not None

    @property
    def remembers(self) -> bool:
        """Whether β depends on the steps before."""
        return self.adaptive_beta is not None

    @model_validator(mode="after")
    def _check(self) -> DPO:
        if self.logps == "mean" and self.divergence.type != "reverse_kl":
            what = f"`divergence: {self.divergence.type}` is not defined for `logps: mean`"
            raise contradiction(what, "set `logps: sum`, or leave `divergence` out")
        return self

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−(1−ε)·ls(βΔ − m) − ε·ls(−βΔ + m), m = `margin_scale` · the pair's margin in the data; 0 where it is null."""
        c, r = log_ratios(policy, reference, self.logps)
        z = self._beta(c - r, step) * (self.divergence(c) - self.divergence(r)) - self.margins(step)
        return rewards(_logistic(z, self.label_smoothing), self.beta, c, r)

    def _beta(self, delta: Tensor, step: StepInfo) -> float:
        """Return the step's β."""
        if self.adaptive_beta is None or "margin" not in step.memory:
            return self.beta
        excess = self.beta * float(delta.detach().mean()) - step.memory["margin"]
        # A step of bad pairs may not turn the loss round.
        return min(self.beta * max(1 + self.adaptive_beta.alpha * excess, 1e-3), 100.0)

    def after_step(self, memory: Memory, means: Mapping[str, float]) -> Memory:
        """M₀ ← m·M₀ + (1−m)·mean reward margin; the first step's margin begins it."""
        if self.adaptive_beta is None:
            return memory
        m, margin = self.adaptive_beta.momentum, means["rewards/margins"]
        return {"margin": m * memory.get("margin", margin) + (1 - m) * margin}


class Robust(LossSettings):
    """DPO made unbiased for labels of which a known share is wrong.

    Use: labels of which a share is flipped at random, where that share is known or well estimated.
    Watch: it has no lower bound and its slope never vanishes, so that Δ grows as long as training goes on; towards
    ε = ½ the division makes noise large.
    Takes: sums
    Source: Chowdhury et al. 2024, arXiv 2403.00409.
    """

    type: Literal["robust"] = "robust"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: Smoothing = 0.1
    """ε: the share of wrong labels."""
    divergence: Divergence = ReverseKL()
    """What holds the policy to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """[−(1−ε)·ls(βΔ) + ε·ls(−βΔ)] / (1−2ε)."""
        c, r = log_ratios(policy, reference)
        z, epsilon = self.beta * (self.divergence(c) - self.divergence(r)), self.label_smoothing
        return rewards((-(1 - epsilon) * ls(z) + epsilon * ls(-z)) / (1 - 2 * epsilon), self.beta, c, r)


class IPO(LossSettings):
    """Identity Preference Optimization: Δ is led to a finite target instead of to infinity.

    Use: few pairs, or labels so clean that a logistic loss would run off to infinity.
    Watch: a small β is a far target: at 0.1 and with means it is 5 nats for every token. It begins at 1/(4β²), and a
    pair that is beyond the target is pulled back.
    Takes: sums or means, by `logps`
    Source: Azar et al. 2023, arXiv 2310.12036, equation 17; its τ is β here. The authors' results are those of means
    over the tokens.
    """

    type: Literal["ipo"] = "ipo"
    """Which loss."""
    beta: Beta = 0.1
    """The target of the difference is 1 / (2β)."""
    logps: Literal["sum", "mean"] = "mean"
    """Whether a response's log-probability is the sum over its tokens or their mean."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """(Δ − 1/(2β))²."""
        c, r = log_ratios(policy, reference, self.logps)
        return rewards((c - r - 1 / (2 * self.beta)).square(), self.beta, c, r)


class Hinge(LossSettings):
    """A margin of 1 in βΔ, and nothing beyond it.

    Use: pairs that are told apart clearly should stop pulling.
    Watch: beyond a margin of 1/β a pair has no gradient; where all have it, nothing more is learned.
    Takes: sums
    Source: SLiC, Zhao et al. 2023, arXiv 2305.10425, with the log-ratios of RSO, Liu et al. 2023, arXiv 2309.06657.
    """

    type: Literal["hinge"] = "hinge"
    """Which loss."""
    beta: Beta = 0.1
    """The inverse of the margin."""
    divergence: Divergence = ReverseKL()
    """What holds the policy to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """max(0, 1 − βΔ)."""
        c, r = log_ratios(policy, reference)
        return rewards((1 - self.beta * (self.divergence(c) - self.divergence(r))).relu(), self.beta, c, r)


class EXO(LossSettings):
    """The reverse KL from the policy's preference to the labels'.

    Use: the policy should settle on what is surely preferred, rather than cover all that is.
    Watch: it has its minimum at βΔ = log((1−ε)/ε), 6.9 by default, and a pair that stands far the wrong way round pulls
    little.
    Takes: sums
    Source: Ji et al. 2024, arXiv 2402.00856, equation 16.
    """

    type: Literal["exo"] = "exo"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: float = Field(1e-3, ge=1e-6, lt=0.5)
    """ε: the probability that the labels give to the rejected response."""
    divergence: Divergence = ReverseKL()
    """What holds the policy to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """σ(βΔ)·[ls(βΔ) − log(1−ε)] + σ(−βΔ)·[ls(−βΔ) − log ε]."""
        c, r = log_ratios(policy, reference)
        z, epsilon = self.beta * (self.divergence(c) - self.divergence(r)), self.label_smoothing
        chosen = z.sigmoid() * (ls(z) - math.log1p(-epsilon))
        return rewards(chosen + (-z).sigmoid() * (ls(-z) - math.log(epsilon)), self.beta, c, r)


class NCA(LossSettings):
    """Noise Contrastive Alignment: raises the chosen response's own likelihood, not the difference alone.

    Use: the chosen response should not become less likely, as in reasoning or code.
    Watch: βc is led to log 2 and no further; then margins grow by rejected responses alone. It begins at 2 log 2.
    Takes: sums
    Source: Chen et al. 2024, arXiv 2402.05369, for two responses.
    """

    type: Literal["nca"] = "nca"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(βc) − ½·ls(−βc) − ½·ls(−βr)."""
        c, r = log_ratios(policy, reference)
        x, y = self.beta * c, self.beta * r
        return rewards(-ls(x) - ls(-x) / 2 - ls(-y) / 2, self.beta, c, r)


class BCO(LossSettings):
    """Binary Classifier Optimization: tells chosen responses from rejected ones, each by itself.

    δ is the mean reward of a response, averaged over the steps before; evaluations take 0.

    Use: responses that are good or bad by themselves, such as thumbs up and down, rather than better than another.
    Watch: δ moves, so the loss of one step is not quite comparable with that of another: follow the margins. It begins
    at 2 log 2. The paper's weights for prompts that differ between good and bad responses are not part of it.
    Takes: sums
    Source: Jung et al. 2024, arXiv 2404.04656.
    """

    type: Literal["bco"] = "bco"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    running_mean: bool = True
    """Whether rewards are compared with their running mean; else with 0."""

    @property
    def remembers(self) -> bool:
        """Whether there is a running mean."""
        return self.running_mean

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(βc − δ) − ls(−(βr − δ))."""
        c, r = log_ratios(policy, reference)
        delta = step.memory.get("reward", 0.0)
        return rewards(-ls(self.beta * c - delta) - ls(delta - self.beta * r), self.beta, c, r)

    def after_step(self, memory: Memory, means: Mapping[str, float]) -> Memory:
        """Take the step's mean reward into the mean over all steps."""
        if not self.running_mean:
            return memory
        steps = memory.get("steps", 0.0) + 1
        reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
        before = memory.get("reward", 0.0)
        return {"steps": steps, "reward": before + (reward - before) / steps}


class SPPO(LossSettings):
    """Self-Play Preference Optimization with certain labels: c is led to 1/(2β), r to −1/(2β).

    Use: pairs sampled from the policy itself and ranked anew in every round.
    Watch: at the default β the targets are 500 nats away, so that its values are huge, gradients are always clipped
    and the learning rate alone sets the pace. Rewards are small by the same β: those nearer than 1e-4 count as a tie.
    Takes: sums
    Source: Wu et al. 2024, arXiv 2405.00675, equation 4.7, its η being 1/β, with probabilities 1 and 0.
    """

    type: Literal["sppo"] = "sppo"
    """Which loss."""
    beta: Beta = 1e-3
    """The target of a log-ratio is 1 / (2β)."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """(c − 1/(2β))² + (r + 1/(2β))²."""
        c, r = log_ratios(policy, reference)
        target = 1 / (2 * self.beta)
        return rewards((c - target).square() + (r + target).square(), self.beta, c, r)


class AOT(LossSettings):
    """Alignment via Optimal Transport: the policy's preferences as a whole should exceed the reference's.

    The differences log π(chosen) − log π(rejected) of a step are sorted, those of the reference too, and compared
    rank by rank.

    Use: preferences that hold on the whole rather than pair by pair.
    Watch: ranks among a few pairs say little, so steps want many. A step of several forward passes is computed twice
    forward. The loss logged for a pair is that of its rank.
    Takes: sums
    Source: Melnyk et al. 2024, arXiv 2406.05882, the paired variant.
    """

    type: Literal["aot"] = "aot"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: Smoothing = 0.0
    """ε: the share of wrong labels."""

    @property
    def looks_at_step(self) -> bool:
        """It sorts all pairs of the step."""
        return True

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−(1−ε)·ls(βδ) − ε·ls(−βδ), δ = the policy's k-th difference − the reference's k-th."""
        c, r = log_ratios(policy, reference)
        of_policy, order = (policy.chosen - policy.rejected).sort()
        delta = of_policy - (reference.chosen - reference.rejected).sort().values
        # Each pair is told the loss of its own rank.
        losses = _logistic(self.beta * delta, self.label_smoothing)[order.argsort()]
        return rewards(losses, self.beta, c, r)


class AOTUnpaired(LossSettings):
    """Alignment via Optimal Transport without pairs: chosen responses as a whole should exceed rejected ones.

    The log-ratios of a step's chosen responses are sorted, those of its rejected ones too, and compared rank by rank.

    Use: chosen and rejected responses that have little to do with each other, or answer different prompts.
    Watch: as for `aot`: steps want many pairs, and several forward passes are computed twice.
    Takes: sums
    Source: Melnyk et al. 2024, arXiv 2406.05882, the unpaired variant.
    """

    type: Literal["aot_unpaired"] = "aot_unpaired"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    label_smoothing: Smoothing = 0.0
    """ε: the share of wrong labels."""

    takes_weights: ClassVar[bool] = False

    @property
    def looks_at_step(self) -> bool:
        """It sorts all responses of the step."""
        return True

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−(1−ε)·ls(βδ) − ε·ls(−βδ), δ = the k-th c − the k-th r."""
        c, r = log_ratios(policy, reference)
        sorted_c, order = c.sort()
        losses = _logistic(self.beta * (sorted_c - r.sort().values), self.label_smoothing)
        # A pair is told the loss of its chosen response's rank.
        return rewards(losses[order.argsort()], self.beta, c, r)


class APOZero(LossSettings):
    """Anchored Preference Optimization: chosen becomes likelier, rejected less likely, each for itself.

    For chosen responses that are better than what the model would say.

    Use: chosen responses that are better than the model's own.
    Watch: it makes chosen responses likelier even where they are no better. Its slopes vanish at both ends, so pairs
    that stand far the wrong way round pull little.
    Takes: sums
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.
    """

    type: Literal["apo_zero"] = "apo_zero"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """1 − σ(βc) + σ(βr)."""
        c, r = log_ratios(policy, reference)
        return rewards(1 - (self.beta * c).sigmoid() + (self.beta * r).sigmoid(), self.beta, c, r)


class APODown(LossSettings):
    """Anchored Preference Optimization: chosen becomes less likely, rejected still less.

    For chosen responses that are worse than what the model would say.

    Use: chosen responses that are worse than the model's own, of which the difference to the rejected ones is right.
    Watch: chosen responses become less likely by intention; look at what the model writes.
    Takes: sums
    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.
    """

    type: Literal["apo_down"] = "apo_down"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """σ(βc) + 1 − σ(βΔ)."""
        c, r = log_ratios(policy, reference)
        return rewards((self.beta * c).sigmoid() + 1 - (self.beta * (c - r)).sigmoid(), self.beta, c, r)


class DiscoPOP(LossSettings):
    """A blend of logistic and exponential loss that a language model proposed.

    Use: to compare with the paper.
    Watch: it is not convex. At the default τ it has a minimum at βΔ = −0.12 and falls for good only past βΔ = 0.07;
    where training begins, at 0, it rises with the margin.
    Takes: sums
    Source: Lu et al. 2024, arXiv 2406.08414, equation 5.
    """

    type: Literal["discopop"] = "discopop"
    """Which loss."""
    beta: Beta = 0.05
    """How hard the policy is held to the reference."""
    tau: float = Field(0.05, ge=1e-3, le=1)
    """τ: how sharply the blend goes from one to the other."""
    divergence: Divergence = ReverseKL()
    """What holds the policy to the reference."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """(1−m)·(−ls(βΔ)) + m·e^(−βΔ), m = σ(βΔ/τ)."""
        c, r = log_ratios(policy, reference)
        z = self.beta * (self.divergence(c) - self.divergence(r))
        # m·e^(−z) as one exponential, since e^(−z) alone overflows where m vanishes.
        losses = (-z / self.tau).sigmoid() * -ls(z) + (ls(z / self.tau) - z).exp()
        return rewards(losses, self.beta, c, r)


class DPOP(LossSettings):
    """DPO-Positive: a penalty where the chosen response becomes less likely than under the reference.

    Use: responses that differ in a few tokens only, as in mathematics, where `dpo` makes the chosen one less likely.
    Watch: λ counts before β: at 50, a nat that chosen has lost weighs as much as 50 nats of Δ. At 0 it is `dpo`.
    Takes: sums
    Source: Smaug, Pal et al. 2024, arXiv 2402.13228.
    """

    type: Literal["dpop"] = "dpop"
    """Which loss."""
    beta: Beta = 0.3
    """How hard the policy is held to the reference."""
    penalty: float = Field(50.0, ge=0, le=1000)
    """λ: the weight of the penalty."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(β(Δ − λ·max(0, −c)))."""
        c, r = log_ratios(policy, reference)
        return rewards(-ls(self.beta * (c - r - self.penalty * (-c).relu())), self.beta, c, r)


class SimPO(LossSettings):
    """Simple Preference Optimization: mean log-probabilities and a target margin, without a reference.

    Use: no memory or time for a reference, and length should not count.
    Watch: nothing but small steps holds the policy near where it began: keep the learning rate low and read what the
    model writes. Of γ it is the ratio γ/β that matters.
    Takes: means
    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """

    type: Literal["simpo"] = "simpo"
    """Which loss."""
    beta: Beta = 2.0
    """The scale of the mean log-probabilities."""
    gamma: float = Field(1.0, ge=0, le=100)
    """γ: the margin that chosen should have before rejected."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(β(log π(y_c)/|y_c| − log π(y_r)/|y_r|) − γ)."""
        c, r = log_ratios(policy, reference, "mean")
        return rewards(-ls(self.beta * (c - r) - self.gamma), self.beta, c, r)


class ORPO(LossSettings):
    """Odds Ratio Preference Optimization: supervised fine-tuning and a preference term in one, without a reference.

    Use: a base model, in one stage instead of fine-tuning first.
    Watch: at the default λ it is fine-tuning above all: chosen responses have to be worth imitating, and the learning
    rate is that of fine-tuning.
    Takes: means, and the mean over the step's chosen tokens
    Source: Hong et al. 2024, arXiv 2403.07691, equations 6 and 7.
    """

    type: Literal["orpo"] = "orpo"
    """Which loss."""
    beta: Beta = 0.1
    """λ: the weight of the odds ratio."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """NLL of chosen − λ·ls(log odds of chosen − log odds of rejected), odds = p/(1−p), p = e^(mean log π)."""
        c, r = log_ratios(policy, reference, "mean")
        odds_ratio = c - r - (_log_one_minus_exp(c) - _log_one_minus_exp(r))
        return rewards(chosen_nll(policy, step) - self.beta * ls(odds_ratio), self.beta, c, r)


class CPO(LossSettings):
    """Contrastive Preference Optimization: DPO against a uniform reference, and the chosen response's likelihood.

    Use: chosen responses that are next to perfect, such as good translations, and no reference.
    Watch: sums without a reference: of two responses the longer one is less likely by its length alone. At α = 0
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

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(β(log π(y_c) − log π(y_r))) + α·NLL of chosen."""
        c, r = log_ratios(policy, reference)
        return rewards(-ls(self.beta * (c - r)) + self.alpha * chosen_nll(policy, step), self.beta, c, r)


class RDPO(LossSettings):
    """DPO for a reward from which every token of length is subtracted.

    Where r − α|y| is to be maximised, the reward is β · log-ratio + α|y|: a chosen response that is the longer one
    has explained its preference by its length alone, and moves the policy less.

    Use: longer responses win among your pairs, and the policy should not learn that.
    Watch: α counts every token: at 0.01 a hundred of them weigh as much as βΔ = 1. It does not begin at log 2.
    Takes: sums and lengths
    Source: Park et al. 2024, arXiv 2403.19159.
    """

    type: Literal["r_dpo"] = "r_dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = Field(0.01, ge=0, le=10)
    """α: what a token of length is worth."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(βΔ + α(|y_c| − |y_r|))."""
        c, r = log_ratios(policy, reference)
        longer = policy.chosen_lengths - policy.rejected_lengths
        return rewards(-ls(self.beta * (c - r) + self.alpha * longer), self.beta, c, r)


class LDDPO(LossSettings):
    """Length-Desensitized DPO: tokens beyond the shorter response's length count less.

    Use: as for `r_dpo`, by counting the tail of the longer response less.
    Watch: at α near 0 what stands in that tail is hardly trained, the end token included.
    Takes: token values, of the first tokens and of the others
    Source: Liu et al. 2024, arXiv 2409.06411.
    """

    type: Literal["ld_dpo"] = "ld_dpo"
    """Which loss."""
    beta: Beta = 0.1
    """How hard the policy is held to the reference."""
    alpha: float = Field(0.5, ge=0, le=1)
    """α: what such a token counts; 1 is DPO."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−ls(βΔ), with log π(y) = the first min(|y_c|, |y_r|) tokens + α · the others."""
        c, r = log_ratios(policy.desensitized(self.alpha), reference.desensitized(self.alpha))
        return rewards(-ls(self.beta * (c - r)), self.beta, c, r)


class SFT(LossSettings):
    """Supervised fine-tuning on the chosen responses, to be added to another loss.

    Use: beside a preference loss that would let the chosen response become less likely.
    Watch: alone it is fine-tuning on chosen responses, and rejected ones are never looked at.
    Takes: the mean over the step's chosen tokens
    Source: the negative log-likelihood, a mean over all chosen tokens of the step.
    """

    type: Literal["sft"] = "sft"
    """Which loss."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps, step: StepInfo) -> PairLosses:
        """−log π(y_c) / |y_c|, over all tokens of the step."""
        return rewards(chosen_nll(policy, step), 1.0, *log_ratios(policy, reference, "mean"))


def _logistic(z: Tensor, epsilon: float) -> Tensor:
    """Return −(1−ε)·ls(z) − ε·ls(−z)."""
    return -(1 - epsilon) * ls(z) - epsilon * ls(-z)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 − e^x) for x ≤ 0; next to 0, where it is −∞ and no float has an answer, a finite value."""
    return (-x.clamp(max=-1e-6).expm1()).log()


Loss = Annotated[
    DPO
    | Robust
    | IPO
    | Hinge
    | EXO
    | NCA
    | BCO
    | SPPO
    | AOT
    | AOTUnpaired
    | APOZero
    | APODown
    | DiscoPOP
    | DPOP
    | SimPO
    | ORPO
    | CPO
    | RDPO
    | LDDPO
    | SFT,
    Field(discriminator="type"),
]
"""The closed union of all losses, told apart by `type`."""
