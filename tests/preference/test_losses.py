"""Losses against closed forms in float64, one for each, and what all of them have to keep.

Every closed form is written with plain numbers for one pair: c and r are the log-ratios, `pc` and `pr` the policy's
log-probabilities, `m` and `n` the lengths of the responses. −log σ(x) is softplus(−x) = log(1 + e^−x).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    LDDPO,
    NCA,
    ORPO,
    RDPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Loss,
    Robust,
    SimPO,
)
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.preference.losses.divergences import Alpha, ForwardKL, JensenShannon, ReverseKL
from dpo_cli.preference.losses.pairwise import AdaptiveBeta
from dpo_cli.settings import members

LOSSES: tuple[Any, ...] = members(Loss)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


@dataclass(frozen=True)
class Pair:
    """One pair: the policy's and the reference's token log-probabilities of both responses."""

    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    reference_chosen: tuple[float, ...]
    reference_rejected: tuple[float, ...]

    @property
    def pc(self) -> float:
        return math.fsum(self.chosen)

    @property
    def pr(self) -> float:
        return math.fsum(self.rejected)

    @property
    def c(self) -> float:
        return self.pc - math.fsum(self.reference_chosen)

    @property
    def r(self) -> float:
        return self.pr - math.fsum(self.reference_rejected)

    @property
    def m(self) -> int:
        return len(self.chosen)

    @property
    def n(self) -> int:
        return len(self.rejected)


def sequences(pairs: list[Pair], *, reference: bool = False) -> SequenceLogps:
    names = ("reference_chosen", "reference_rejected") if reference else ("chosen", "rejected")
    responses = [getattr(pair, name) for name in names for pair in pairs]
    tokens = torch.tensor([token for response in responses for token in response], dtype=torch.float64)
    return SequenceLogps(tokens.requires_grad_(not reference), Responses.of(list(map(len, responses))))


def step(pairs: list[Pair], **more: Any) -> StepInfo:
    return StepInfo(len(pairs), sum(pair.m for pair in pairs), **more)


def apply(loss: Any, pairs: list[Pair], **more: Any) -> Any:
    """Apply a loss; one that needs no reference gets one as well, and has to ignore it."""
    return loss(sequences(pairs), sequences(pairs, reference=True), step(pairs, **more))


def ld(pair: Pair, alpha: float) -> tuple[float, float]:
    """C and r with tokens beyond the shorter response weighed by α."""
    shared = min(pair.m, pair.n)

    def weighed(tokens: tuple[float, ...]) -> float:
        return math.fsum(tokens[:shared]) + alpha * math.fsum(tokens[shared:])

    return (
        weighed(pair.chosen) - weighed(pair.reference_chosen),
        weighed(pair.rejected) - weighed(pair.reference_rejected),
    )


def log_odds(mean: float) -> float:
    """log(p / (1−p)) of p = e^mean."""
    return mean - math.log(-math.expm1(mean))


def of_delta(form: Callable[[float], float], beta: float) -> Callable[[Pair], float]:
    return lambda pair: form(beta * (pair.c - pair.r))


FORMS: list[tuple[Any, Callable[[Pair], float]]] = [
    # −log σ(βΔ) = softplus(−βΔ)
    (DPO(beta=0.3), of_delta(lambda z: softplus(-z), 0.3)),
    # the share ε of the labels turned round
    (DPO(beta=0.3, label_smoothing=0.2), of_delta(lambda z: 0.8 * softplus(-z) + 0.2 * softplus(z), 0.3)),
    # c/m − r/n in place of Δ
    (DPO(beta=2.0, logps="mean"), lambda p: softplus(-2.0 * (p.c / p.m - p.r / p.n))),
    # f′ of forward KL: 1 − e^−x
    (DPO(beta=0.3, divergence=ForwardKL()), lambda p: softplus(-0.3 * (math.exp(-p.r) - math.exp(-p.c)))),
    # log 2 − softplus(−x)
    (DPO(beta=0.3, divergence=JensenShannon()), lambda p: softplus(-0.3 * (softplus(-p.r) - softplus(-p.c)))),
    # (e^((α−1)x) − 1)/(α−1) at α = ½: 2 − 2e^(−x/2)
    (DPO(beta=0.3, divergence=Alpha()), lambda p: softplus(-0.6 * (math.exp(-p.r / 2) - math.exp(-p.c / 2)))),
    (Robust(beta=0.3, label_smoothing=0.2), of_delta(lambda z: (0.8 * softplus(-z) - 0.2 * softplus(z)) / 0.6, 0.3)),
    (IPO(beta=0.3), lambda p: (p.c / p.m - p.r / p.n - 1 / 0.6) ** 2),
    (IPO(beta=0.3, logps="sum"), lambda p: (p.c - p.r - 1 / 0.6) ** 2),
    (Hinge(beta=0.3), of_delta(lambda z: max(0.0, 1 - z), 0.3)),
    # Σ q log(q/p) with q = (σ(z), σ(−z)) and p = (1−ε, ε)
    (
        EXO(beta=0.3, label_smoothing=0.1),
        of_delta(lambda z: sigmoid(z) * math.log(sigmoid(z) / 0.9) + sigmoid(-z) * math.log(sigmoid(-z) / 0.1), 0.3),
    ),
    (NCA(beta=0.3), lambda p: softplus(-0.3 * p.c) + softplus(0.3 * p.c) / 2 + softplus(0.3 * p.r) / 2),
    (BCO(beta=0.3), lambda p: softplus(-0.3 * p.c) + softplus(0.3 * p.r)),
    (SPPO(beta=0.3), lambda p: (p.c - 1 / 0.6) ** 2 + (p.r + 1 / 0.6) ** 2),
    # sorting one pair changes nothing: the policy's difference less the reference's is Δ
    (AOT(beta=0.3, label_smoothing=0.2), of_delta(lambda z: 0.8 * softplus(-z) + 0.2 * softplus(z), 0.3)),
    (AOTUnpaired(beta=0.3), of_delta(lambda z: softplus(-z), 0.3)),
    (APOZero(beta=0.3), lambda p: sigmoid(-0.3 * p.c) + sigmoid(0.3 * p.r)),
    (APODown(beta=0.3), lambda p: sigmoid(0.3 * p.c) + sigmoid(-0.3 * (p.c - p.r))),
    (
        DiscoPOP(beta=0.3, tau=0.5),
        of_delta(lambda z: sigmoid(-2 * z) * softplus(-z) + sigmoid(2 * z) * math.exp(-z), 0.3),
    ),
    (DPOP(beta=0.3, penalty=5.0), lambda p: softplus(-0.3 * (p.c - p.r - 5.0 * max(0.0, -p.c)))),
    (SimPO(beta=2.0, gamma=0.5), lambda p: softplus(0.5 - 2.0 * (p.pc / p.m - p.pr / p.n))),
    # the chosen response alone is all of the step's tokens: the NLL is −pc/m
    (ORPO(beta=0.3), lambda p: -p.pc / p.m + 0.3 * softplus(log_odds(p.pr / p.n) - log_odds(p.pc / p.m))),
    (CPO(beta=0.3, alpha=0.7), lambda p: softplus(-0.3 * (p.pc - p.pr)) - 0.7 * p.pc / p.m),
    # maximising r − α|y| makes the reward β·log-ratio + α|y|
    (RDPO(beta=0.3, alpha=0.2), lambda p: softplus(-(0.3 * p.c + 0.2 * p.m - 0.3 * p.r - 0.2 * p.n))),
    (LDDPO(beta=0.3, alpha=0.4), lambda p: softplus(-0.3 * (ld(p, 0.4)[0] - ld(p, 0.4)[1]))),
    (SFT(), lambda p: -p.pc / p.m),
]

token = st.floats(-8, -0.01)
response = st.lists(st.tuples(token, token), min_size=1, max_size=5)


@st.composite
def drawn_pairs(draw: Any) -> Pair:
    sides = draw(response), draw(response)
    return Pair(*(tuple(token[model] for token in side) for model in (0, 1) for side in sides))


def test_every_loss_has_a_closed_form_here():
    assert {type(loss) for loss, _ in FORMS} == set(LOSSES)


def named(value: Any) -> str | None:
    return f"{value.type}-{value.model_dump(exclude_defaults=True)}" if hasattr(value, "needs_reference") else None


@pytest.mark.parametrize(("loss", "form"), FORMS, ids=lambda value: named(value) or "")
@given(pair=drawn_pairs())
def test_a_loss_is_its_closed_form_and_so_is_its_gradient(loss, form, pair):
    """The gradient by central differences of the closed form: (f(x+h) − f(x−h)) / 2h, with an error of h²."""
    policy = sequences([pair])
    losses = loss(policy, sequences([pair], reference=True), step([pair])).losses
    assert losses.item() == pytest.approx(form(pair), rel=1e-10, abs=1e-10)
    losses.sum().backward()
    slopes = policy.tokens.grad.tolist()
    for place, slope in enumerate(slopes):
        side, at = ("chosen", place) if place < pair.m else ("rejected", place - pair.m)
        h = 1e-5

        def moved(by: float, side: str = side, at: int = at) -> float:
            tokens = list(getattr(pair, side))
            tokens[at] += by
            return form(Pair(**{**pair.__dict__, side: tuple(tokens)}))

        left, right = (form(pair) - moved(-h)) / h, (moved(h) - form(pair)) / h
        # Where the loss has a corner, any slope between those of its sides will do; a difference of large values is
        # rounded as these are.
        rounding = 4 * sys.float_info.epsilon * abs(form(pair)) / h
        slack = 1e-4 * max(1.0, abs(left), abs(right)) + rounding
        assert min(left, right) - slack <= slope <= max(left, right) + slack


@pytest.mark.parametrize(("loss", "form"), FORMS, ids=lambda value: named(value) or "")
def test_gradients_are_those_of_finite_differences_of_the_class(loss, form):
    """Torch's own checker, in float64, on three pairs at once."""
    torch.manual_seed(1)
    lengths = (3, 1, 4, 2, 2, 5)
    responses = Responses.of(lengths)
    tokens = (-3 * torch.rand(sum(lengths), dtype=torch.float64) - 0.1).requires_grad_()
    reference = -3 * torch.rand(sum(lengths), dtype=torch.float64)

    def losses(values: torch.Tensor) -> torch.Tensor:
        return loss(SequenceLogps(values, responses), SequenceLogps(reference, responses), StepInfo(3, 8)).losses

    assert torch.autograd.gradcheck(losses, (tokens,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("loss", [kind() for kind in LOSSES], ids=lambda loss: loss.type)
@pytest.mark.parametrize("beta", [1e-4, 0.1, 100.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("sign", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_at_the_limits_loss_and_gradient_are_finite(loss, beta, size, sign):
    """One-token responses, identical ones, and log-ratios of ±10⁴, in float32."""
    if "beta" in type(loss).model_fields:
        loss = loss.model_copy(update={"beta": beta})
    # A log-probability is never above 0: where the ratio is to be positive, the reference has the large one.
    values = [-size if s < 0 else 0.0 for s in sign]
    base = [-size if s > 0 else 0.0 for s in sign]
    policy = SequenceLogps(torch.tensor(values * 2, requires_grad=True), Responses.of((1, 1, 1, 1)))
    reference = SequenceLogps(torch.tensor(base * 2), Responses.of((1, 1, 1, 1)))
    found = loss(policy, reference, StepInfo(2, 2))
    found.losses.sum().backward()
    assert torch.isfinite(found.losses).all()
    assert torch.isfinite(policy.tokens.grad).all()


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon(), Alpha(alpha=0.01)])
@pytest.mark.parametrize("kind", [DPO, Robust, Hinge, EXO, DiscoPOP])
def test_under_every_divergence_extreme_ratios_stay_finite(kind, divergence):
    for chosen, rejected in ((1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)):
        policy = SequenceLogps(torch.tensor([chosen, rejected], requires_grad=True), Responses.of((1, 1)))
        found = kind(divergence=divergence)(policy, SequenceLogps(torch.zeros(2), Responses.of((1, 1))), StepInfo(1, 1))
        found.losses.sum().backward()
        assert torch.isfinite(found.losses).all()
        assert torch.isfinite(policy.tokens.grad).all()


def test_alpha_lies_between_forward_and_reverse_kl():
    """α → 1 gives x, α → 0 gives 1 − e^−x."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    torch.testing.assert_close(Alpha(alpha=1 - 1e-9)(x), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(Alpha(alpha=1e-9)(x), ForwardKL()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("logps", ["sum", "mean"])
def test_where_policy_equals_reference_the_loss_is_ln_2_and_the_margin_0(epsilon, logps):
    same = SequenceLogps(-torch.rand(10, dtype=torch.float64), Responses.of((2, 3, 4, 1)))
    found = DPO(label_smoothing=epsilon, logps=logps)(same, same, StepInfo(2, 5))
    assert found.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert (found.chosen_rewards - found.rejected_rewards).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [kind() for kind in LOSSES], ids=lambda loss: loss.type)
def test_rewards_are_beta_times_what_the_loss_looks_at_and_carry_no_gradient(loss):
    pair = Pair((-1.0, -2.0), (-3.0, -1.5, -0.5), (-2.0, -0.5), (-1.0, -1.0, -1.0))
    found = apply(loss, [pair])
    assert found.losses.requires_grad
    assert not found.chosen_rewards.requires_grad
    c, r = (pair.c, pair.r) if loss.needs_reference else (pair.pc, pair.pr)
    if loss.type in ("ipo", "simpo", "orpo", "sft"):
        c, r = c / pair.m, r / pair.n
    if loss.type == "ld_dpo":
        c, r = ld(pair, loss.alpha)
    beta = getattr(loss, "beta", 1.0)
    assert found.chosen_rewards.item() == pytest.approx(beta * c, rel=1e-9, abs=1e-12)
    assert found.rejected_rewards.item() == pytest.approx(beta * r, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("scale", "m"), [(0.5, 2.0), (1.0, 4.0), (2, 8.0), (None, 0.0)])
def test_a_margin_in_the_data_counts_as_much_as_its_scale_says(scale, m):
    """−log σ(βΔ − m) with βΔ = 0.4 · 5 = 2 and m = s · 4: ln 2 where both are the same."""
    pair = Pair((-1.0,), (-6.0,), (-1.0,), (-1.0,))
    found = apply(DPO(beta=0.4, margin_scale=scale), [pair], margins=torch.tensor([4.0]))
    assert found.losses.item() == pytest.approx(softplus(m - 2.0))


@pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind().type)
def test_only_losses_that_are_told_to_use_margins_look_at_them(kind):
    pair = Pair((-1.0, -2.0), (-3.0, -1.5, -0.5), (-2.0, -0.5), (-1.0, -1.0, -1.0))
    plain, marked = (apply(kind(), [pair], margins=torch.tensor([margin])).losses.item() for margin in (0.0, 7.0))
    assert marked == plain
    if "margin_scale" in kind.model_fields:
        assert apply(kind(margin_scale=0.5), [pair], margins=torch.tensor([7.0])).losses.item() != plain
    else:
        with pytest.raises(ValidationError, match="margin_scale"):
            kind(margin_scale=0.5)


@pytest.mark.parametrize("scale", [0, -1, math.inf, "1"])
def test_a_scale_of_margins_is_a_number_above_0(scale):
    with pytest.raises(ValidationError, match="margin_scale"):
        DPO(margin_scale=scale)


PAIRS = [
    Pair((-1.0, -2.0), (-3.0,), (-1.5, -1.0), (-1.0,)),
    Pair((-4.0,), (-0.5, -2.0), (-1.0,), (-2.0, -2.0)),
    Pair((-0.5, -0.5, -0.5), (-1.0,), (-2.0, -0.2, -0.1), (-5.0,)),
]


def test_transport_compares_sorted_differences_and_not_pairs():
    """k-th smallest difference of the policy less the k-th smallest of the reference; the sum does not ask whose."""
    loss = AOT(beta=0.3)
    of_policy = sorted(p.pc - p.pr for p in PAIRS)
    of_reference = sorted((p.pc - p.c) - (p.pr - p.r) for p in PAIRS)
    expected = [softplus(-0.3 * (a - b)) for a, b in zip(of_policy, of_reference, strict=True)]
    found = apply(loss, PAIRS).losses
    assert sorted(found.tolist()) == pytest.approx(sorted(expected))
    largest = max(range(3), key=lambda i: PAIRS[i].pc - PAIRS[i].pr)
    assert found[largest].item() == pytest.approx(expected[-1])

    unpaired = [
        softplus(-0.3 * (c - r)) for c, r in zip(sorted(p.c for p in PAIRS), sorted(p.r for p in PAIRS), strict=True)
    ]
    assert sorted(apply(AOTUnpaired(beta=0.3), PAIRS).losses.tolist()) == pytest.approx(sorted(unpaired))


def test_token_means_divide_by_all_tokens_of_the_step():
    """7.5 nats of chosen responses over 6 tokens: 1.25, and not the mean of the responses' own means."""
    for loss, rest in ((SFT(), 0.0), (CPO(alpha=1.0), None)):
        losses = apply(loss, PAIRS).losses
        other = rest if rest is not None else sum(softplus(-0.1 * (p.pc - p.pr)) for p in PAIRS) / 3
        assert losses.mean().item() == pytest.approx(-sum(p.pc for p in PAIRS) / 6 + other)


def test_bco_compares_rewards_with_the_mean_of_all_steps_before():
    """After steps whose mean rewards were ½(1 + 0) and ½(2 − 1): δ = ½."""
    loss = BCO(beta=0.3)
    statistics = loss.after_step({}, {"rewards/chosen": 1.0, "rewards/rejected": 0.0})
    statistics = loss.after_step(statistics, {"rewards/chosen": 2.0, "rewards/rejected": -1.0})
    found = apply(loss, PAIRS[:1], statistics=statistics)
    c, r = 0.3 * PAIRS[0].c, 0.3 * PAIRS[0].r
    assert found.losses.item() == pytest.approx(softplus(-(c - 0.5)) + softplus(r - 0.5))
    assert BCO(running_mean=False).after_step({}, {"rewards/chosen": 1.0, "rewards/rejected": 0.0}) == {}


def test_adaptive_beta_follows_the_step_s_margin():
    """M₀ = 0.2 after a first step, then 0.9·0.2 + 0.1·1.2 = 0.3; β = β₀(1 + 0.6(M − M₀))."""
    loss = DPO(beta=0.3, adaptive_beta=AdaptiveBeta())
    first = loss.after_step({}, {"rewards/margins": 0.2})
    assert first == pytest.approx({"margin": 0.2})
    statistics = loss.after_step(first, {"rewards/margins": 1.2})
    assert statistics == pytest.approx({"margin": 0.3})
    deltas = [p.c - p.r for p in PAIRS]
    beta = 0.3 * (1 + 0.6 * (0.3 * sum(deltas) / 3 - 0.3))
    found = apply(loss, PAIRS, statistics=statistics)
    assert found.losses.tolist() == pytest.approx([softplus(-beta * delta) for delta in deltas])
    assert apply(loss, PAIRS).losses.tolist() == pytest.approx([softplus(-0.3 * delta) for delta in deltas])
