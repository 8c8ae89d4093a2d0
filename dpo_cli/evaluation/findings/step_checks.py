"""What is looked for in the rows of steps; `STEP_CHECKS` at the end lists it."""

from __future__ import annotations

import math
import statistics

from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.history import History, number
from dpo_cli.evaluation.findings.remedies import ADD_SFT, CHECK_DATA, FEWER_STEPS, LOWER_RATE, RAISE_BETA, RAISE_RATE

_COLLAPSE = 1.0
"""Nats per token by which chosen responses may become less likely.

DPO sees the difference of both responses alone and lowers both a little in healthy runs, by some tenths of a nat a
token at most. At 1 nat each token of what the model should learn to say is e times less likely than before any
training. A pretrained model has 1 to 3 nats per token on ordinary text, so it lost a large part of what it knew.
"""

_SPIKE = 10.0
"""How many times the median of the window before a gradient's norm has to be."""

_STUCK = 0.01
"""The share of ln 2 within which a loss has not moved."""

_ROUNDING = 1e-3
"""How far a loss that begins at ln 2 may be from it at step 1, in bfloat16."""

_LEARNED_NOTHING = 4
"""Windows after the warm-up in which a loss has to move."""


def _both_fall(history: History) -> str:
    """Find both responses less likely than before step 1, the chosen one by more than 1 nat per token."""
    if not history.ends_window:
        return ""
    chosen, rejected = history.moved("chosen"), history.moved("rejected")
    if chosen is None or rejected is None or any(loss.lowers_chosen for loss in history.facts.losses):
        return ""
    if chosen > -_COLLAPSE or rejected > 0:
        return ""
    return f"chosen {chosen:+.2f} nats per token, rejected {rejected:+.2f}, since step 1"


def _gradient_spike(history: History) -> str:
    """Find a gradient far above those of the steps before it, and above those of the beginning."""
    *before, last = history.recent or [{}]
    norm = number(last, "grad_norm")
    if norm is None or last.get("step") != history.step or len(before) < history.facts.window - 1:
        return ""
    norms = [value for row in before if (value := number(row, "grad_norm")) is not None]
    opening = [value for row in history.opening if (value := number(row, "grad_norm")) is not None]
    usual = max(statistics.median(norms), statistics.median(opening)) if norms and opening else math.inf
    return f"its norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}" if norm > _SPIKE * usual else ""


def _stuck_at_ln2(history: History) -> str:
    """Find a loss that is where it began, ln 2, though the learning rate was there for several windows."""
    facts = history.facts
    if not history.ends_window or history.step < facts.warmup_steps + _LEARNED_NOTHING * facts.window:
        return ""
    began = number(history.opening[0], "loss")
    # The loss of step 1 tells the losses that begin there from the others.
    if began is None or abs(began - math.log(2)) > _ROUNDING:
        return ""
    loss = history.mean("loss")
    if loss is None or abs(loss / math.log(2) - 1) > _STUCK:
        return ""
    return f"loss {loss:.4f} over the last {facts.window} steps, ln 2 = 0.6931"


STEP_CHECKS = (
    RunCheck(
        name="both_fall",
        severity="error",
        title="chosen and rejected responses both become less likely",
        meaning=(
            "The loss sees their difference alone; the policy lowers both, and what it says instead is neither of them."
        ),
        remedies=(LOWER_RATE, RAISE_BETA, ADD_SFT, FEWER_STEPS),
        when="chosen responses lost more than 1 nat per token on average",
        look=_both_fall,
    ),
    RunCheck(
        name="gradient_spike",
        severity="warning",
        title="a gradient is far larger than those before",
        meaning="A few pairs pull harder than all others, or the policy has become unstable.",
        remedies=(CHECK_DATA, LOWER_RATE),
        when="the norm before clipping is above 10 times the median of the steps before, and of the first ones",
        look=_gradient_spike,
    ),
    RunCheck(
        name="stuck_at_ln2",
        severity="warning",
        title="the loss stays at ln 2, where it began",
        meaning="The policy does not move, or the labels hold nothing that it can learn.",
        remedies=(RAISE_RATE, CHECK_DATA),
        when="within 1 % of ln 2 four windows after the warm-up",
        look=_stuck_at_ln2,
    ),
)
"""All that is looked for, the gravest first."""
