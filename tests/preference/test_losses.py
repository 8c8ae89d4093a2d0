"""Losses against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.preference.losses import DPO


def one_token_each(*values: float) -> SequenceLogps:
    """Pairs of one-token responses: the chosen values, then the rejected ones."""
    return SequenceLogps(torch.tensor(values, dtype=torch.float64, requires_grad=True), (1,) * len(values))


def closed_form(delta: float, beta: float, epsilon: float) -> float:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ), with −log σ(x) = log(1 + e^−x), written so that neither end overflows."""

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    return (1 - epsilon) * softplus(-beta * delta) + epsilon * softplus(beta * delta)


log_ratio = st.floats(-1e4, 1e4)


@given(log_ratio, log_ratio, log_ratio, log_ratio, st.floats(0.01, 10), st.floats(0, 0.49))
def test_dpo_is_its_equation(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, epsilon):
    policy = one_token_each(policy_chosen, policy_rejected)
    reference = one_token_each(reference_chosen, reference_rejected)
    found = DPO(beta=beta, label_smoothing=epsilon)(policy, reference)
    c, r = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    assert found.losses.item() == pytest.approx(closed_form(c - r, beta, epsilon), rel=1e-12, abs=1e-12)
    assert found.chosen_rewards.item() == pytest.approx(beta * c, rel=1e-12, abs=1e-12)
    assert found.rejected_rewards.item() == pytest.approx(beta * r, rel=1e-12, abs=1e-12)


@given(log_ratio, st.floats(0.01, 10), st.floats(0, 0.49))
def test_its_slope_is_minus_beta_sigma_of_minus_the_margin(delta, beta, epsilon):
    """d/dΔ = −β[(1−ε) σ(−βΔ) − ε σ(βΔ)], which is −β σ(−βΔ) at ε = 0."""
    policy = one_token_each(delta, 0.0)
    DPO(beta=beta, label_smoothing=epsilon)(policy, one_token_each(0.0, 0.0)).losses.sum().backward()
    sigma = 1 / (1 + math.exp(min(700, beta * delta)))
    expected = -beta * ((1 - epsilon) * sigma - epsilon * (1 - sigma))
    chosen, rejected = policy.tokens.grad.tolist()
    assert chosen == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert rejected == pytest.approx(-expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("logps", ["sum", "mean"])
def test_where_policy_equals_reference_the_loss_is_ln_2_and_the_margin_0(epsilon, logps):
    same = SequenceLogps(-torch.rand(10, dtype=torch.float64), (2, 3, 4, 1))
    loss = DPO(label_smoothing=epsilon, logps=logps)
    found = loss(same, same)
    assert found.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert loss.at_reference() == pytest.approx(math.log(2))
    assert (found.chosen_rewards - found.rejected_rewards).tolist() == [0.0, 0.0]


def test_means_divide_each_response_by_its_own_tokens():
    """Here c = (1+3)/2 = 2 and r = (2+4+9)/3 = 5, so Δ = −3."""
    policy = SequenceLogps(torch.tensor([1.0, 3.0, 2.0, 4.0, 9.0], dtype=torch.float64), (2, 3))
    reference = SequenceLogps(torch.zeros(5, dtype=torch.float64), (2, 3))
    found = DPO(beta=2.0, logps="mean")(policy, reference)
    assert found.losses.item() == pytest.approx(closed_form(-3.0, 2.0, 0.0))
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == (4.0, 10.0)


def test_rewards_carry_no_gradient_and_losses_do():
    found = DPO()(one_token_each(1.0, 2.0), one_token_each(0.0, 0.0))
    assert found.losses.requires_grad
    assert not found.chosen_rewards.requires_grad
    assert not found.rejected_rewards.requires_grad
