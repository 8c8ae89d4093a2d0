"""Which losses fit σ(βΔ) to the share of labels: found out from the slope of its mean over many labels."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.losses import CPO, DPO, IPO, Loss, Robust, SimPO
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.preference.losses.pairwise import AdaptiveBeta
from dpo_cli.preference.objective import Objective

LENGTHS = (3, 5)
"""Tokens of the two responses, which differ so that a loss that adds lengths is noticed."""

ONE_BY_ONE = [loss() for loss in get_args(get_args(Loss)[0]) if not loss().compares_pairs]
SET_OTHERWISE = [
    DPO(logps="mean", beta=2.0),
    DPO(label_smoothing=0.1),
    DPO(margin_scale=0.5),
    DPO(divergence="js"),
    Robust(label_smoothing=0.0),
    Robust(label_smoothing=0.0, divergence="forward_kl"),
    IPO(logps="sum"),
    SimPO(gamma=0.0),
    CPO(alpha=0.0),
]


def scored(loss, t, *, swapped):
    """Return the losses of two responses whose log-ratios are t/2 and −t/2, the first one chosen or rejected."""
    halves = [(t / 2 / LENGTHS[0]).repeat_interleave(LENGTHS[0]), (-t / 2 / LENGTHS[1]).repeat_interleave(LENGTHS[1])]
    lengths = [[length] * len(t) for length in LENGTHS]
    if swapped:
        halves, lengths = halves[::-1], lengths[::-1]
    responses = Responses.of([*lengths[0], *lengths[1]])
    policy = SequenceLogps(torch.cat(halves), responses)
    reference = SequenceLogps(torch.zeros_like(policy.tokens), responses)
    # The data says that the first response is better by 2.
    margins = torch.full_like(t, -2.0 if swapped else 2.0)
    return loss(policy, reference, StepInfo(len(t), len(t) * 4, margins))


@pytest.mark.parametrize("loss", [*ONE_BY_ONE, *SET_OTHERWISE], ids=str)
def test_the_mean_loss_is_flat_where_the_sigmoid_is_the_share_of_labels(loss):
    """Of labels of one pair, a share prefers the first response: there the mean of a loss that fits has no slope."""
    one = scored(loss, torch.ones(1, dtype=torch.float64), swapped=False)
    margin_at_one = one.chosen_rewards - one.rejected_rewards
    slopes = []
    for share in (0.7, 0.9):
        t = (math.log(share / (1 - share)) / margin_at_one).requires_grad_()
        mean = share * scored(loss, t, swapped=False).losses + (1 - share) * scored(loss, t, swapped=True).losses
        slopes.append(float(torch.autograd.grad(mean.sum(), t)[0] / margin_at_one))
    assert (slopes == pytest.approx([0, 0], abs=1e-6)) is loss.fits_probability


def test_a_loss_with_a_beta_for_each_step_and_one_that_compares_pairs_fit_none():
    assert not DPO(adaptive_beta=AdaptiveBeta()).fits_probability
    assert not any(loss().fits_probability for loss in get_args(get_args(Loss)[0]) if loss().compares_pairs)


def test_of_several_losses_the_one_whose_rewards_are_reported_decides():
    assert Objective.of([IPO(), DPO()]).fits_probability is False
    assert Objective.of([DPO(), IPO()]).fits_probability is True
