"""Policy, reference and loss together over one batch: what training and evaluation share."""

from __future__ import annotations

from torch import Tensor, nn

from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.preference.losses import Loss, PairLosses
from dpo_cli.preference.reference import ReferenceLogps
from dpo_cli.reporting.metrics import pair_values


def score_pairs(
    scorer: nn.Module, loss: Loss, reference: ReferenceLogps, batch: PairBatch
) -> tuple[PairLosses, Tensor]:
    """Ask policy and reference and apply the loss.

    Args:
        scorer: A `Scorer`, or what Accelerate prepared of one.
        loss: Loss and rewards of pairs.
        reference: Answers with the reference's token log-probabilities.
        batch: B pairs.

    Returns:
        What the loss says, and the `pair_values`, `[B, 7]`.
    """
    policy = SequenceLogps(scorer(batch), batch.lengths)
    pairs = loss(policy, SequenceLogps(reference(batch), batch.lengths))
    values = pair_values(pairs.losses, pairs.chosen_rewards, pairs.rejected_rewards, policy.chosen, policy.rejected)
    return pairs, values
