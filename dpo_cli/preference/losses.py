"""Every loss: one small frozen model each, its equation beside the line; `Loss` at the end lists them.

For a pair: c = log π(chosen) − log π_ref(chosen), r the same of rejected, Δ = c − r, ls = log σ. Logs of
sequences are sums over the response tokens, or means of them under `logps: mean`.

The classes are settings as well, and are read before torch is needed: it is imported where it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dpo_cli.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.logps import SequenceLogps


@dataclass(frozen=True)
class PairLosses:
    """What a loss says of B pairs.

    Attributes:
        losses: `[B]`, with gradient.
        chosen_rewards: `[B]`, β · (policy − reference) of the chosen responses, without gradient.
        rejected_rewards: `[B]`, the same of the rejected ones.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class DPO(Settings):
    """Direct Preference Optimization: a logistic loss on the difference of the two log-ratios.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; with `label_smoothing` the conservative
    variant (Mitchell 2023); with `logps: mean` the length-normalised variant (Tülu 3, arXiv 2411.15124).
    """

    type: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """How hard the policy is held to the reference: 0.01 to 0.5 for sums, 2 to 10 for means."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be the wrong way round (conservative DPO)."""
    logps: Literal["sum", "mean"] = "sum"
    """Whether a response's log-probability is the sum over its tokens or their mean."""

    def __call__(self, policy: SequenceLogps, reference: SequenceLogps) -> PairLosses:
        """Return loss and rewards of each pair."""
        c, r = _log_ratios(policy, reference, self.logps)
        delta, beta, epsilon = c - r, self.beta, self.label_smoothing
        # −(1−ε)·ls(βΔ) − ε·ls(−βΔ)
        losses = -(1 - epsilon) * _ls(beta * delta) - epsilon * _ls(-beta * delta)
        return PairLosses(losses, (beta * c).detach(), (beta * r).detach())

    def at_reference(self) -> float:
        """Return the loss of a policy that equals its reference, where Δ = 0: ln 2 for every ε."""
        import math

        return math.log(2)


def _log_ratios(policy: SequenceLogps, reference: SequenceLogps, logps: str) -> tuple[Tensor, Tensor]:
    """Return c and r of each pair, `[B]`, as sums or as means over the response tokens."""
    c, r = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if logps == "mean":
        return c / policy.chosen_lengths, r / policy.rejected_lengths
    return c, r


def _ls(x: Tensor) -> Tensor:
    """Return log σ(x), without overflow at either end."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


Loss = DPO
"""The closed union of all losses, told apart by `type`. It has one member so far."""
