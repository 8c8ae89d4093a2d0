"""What is looked for in the rows of steps; `STEP_CHECKS` at the end lists it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.history import History, Row, number
from dpo_cli.evaluation.findings.remedies import (
    ADD_SFT,
    CHECK_DATA,
    CLIP,
    FEWER_STEPS,
    LOWER_RATE,
    MORE_STEPS,
    RAISE_BETA,
    RAISE_RATE,
    TRAIN_ADAPTER,
    plain,
)
from dpo_cli.system.text import several

_COLLAPSE = 1.0
"""Nats per token by which chosen responses may become less likely.

DPO sees the difference of both responses alone and lowers both a little in healthy runs, by some tenths of a nat a
token at most. At 1 nat each token of what the model should learn to say is e times less likely than before any
training. A pretrained model has 1 to 3 nats per token on ordinary text, so it lost a large part of what it knew.
"""

_FALL = 0.5
"""Nats per token by which chosen responses may fall while the margin grows: each token is 40 % less likely then."""

_SPIKE = 10.0
"""How many times the usual norm a gradient has to have: those of healthy runs stay within 6 times."""

_EARLY_WINDOWS = 2
"""Windows within which no response loses 1 nat per token in a healthy run; in this program's examples it is a third."""

_OVERSHOT = 0.2
"""The share of the first loss by which a mean over a window may be above it; chance makes less than a tenth."""

_UNMOVED = 0.01
"""The share of the first loss by which it has to change in a run, or its movement in nats per token, to be worth it."""

_ROUNDING = 1e-3
"""How far a loss that begins at ln 2 may be from it at step 1, in bfloat16."""

_PATIENCE_WINDOWS, _PATIENCE_SHARE = 4, 0.25
"""What has to be behind a run before it is called stuck: windows after the warm-up, and a share of its steps."""

_CHANCE = 3.0
"""Standard deviations by which an accuracy above ½ is not chance."""

_VANISHED = 0.02
"""What is left of the first gradients when they have vanished."""

_EASY = 0.1
"""The share of the first epoch within which no data should be learned without an error."""


def _both_fall(history: History) -> str:
    """Find both responses less likely than before step 1, the chosen one by more than 1 nat per token."""
    moved = _falling(history)
    if moved is None or moved[0] > -_COLLAPSE or moved[1] > 0:
        return ""
    return _nats(*moved)


def _chosen_falls(history: History) -> str:
    """Find chosen responses less likely by more than 0.5 nats per token while the margin grows."""
    moved = _falling(history)
    if moved is None or not -_COLLAPSE < moved[0] <= -_FALL or moved[1] > moved[0]:
        return ""
    return _nats(*moved)


def _falling(history: History) -> tuple[float, float] | None:
    """Return by how many nats per token chosen and rejected responses moved, where chosen ones should not fall."""
    if any(loss.lowers_chosen for loss in history.facts.losses):
        return None
    return history.moved()


def _nats(chosen: float, rejected: float) -> str:
    return f"chosen {chosen:+.2f} nats per token, rejected {rejected:+.2f}"


def _gradient_spike(history: History) -> str:
    """Find a gradient above 10 times those of the steps before it, and above all of the run's first ones."""
    norm = number(history.recent[-1], "grad_norm") if history.stepped else None
    # Most steps end here, before any median is computed.
    if norm is None or norm <= history.largest_first_gradient or len(history.recent) < history.facts.window:
        return ""
    usual = statistics.median(_known(list(history.recent)[:-1], "grad_norm") or [math.inf])
    if norm <= _SPIKE * usual:
        return ""
    return f"norm {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}" if usual else f"norm {norm:.3g} after 0"


def _rate_too_high(history: History) -> str:
    """Find a training loss that is 20 % above the one that it began with, or chosen responses that fall far at once."""
    loss, began = history.mean("loss") if history.ends_window else None, history.first_loss
    if loss is None or began is None:
        return ""
    if loss > began + _OVERSHOT * abs(began):
        return f"the training loss rose from {began:.4f} to {loss:.4f} (mean over {history.facts.window} steps)"
    moved = _falling(history) if history.step <= _EARLY_WINDOWS * history.facts.window else None
    return _nats(*moved) if moved and moved[0] < -_COLLAPSE else ""


def _rate_too_low(history: History) -> str:
    """Find a policy that at its pace will hardly have moved at the end of the run."""
    moved = history.moved() if _has_waited(history) and history.facts.from_reference else None
    losses, began = _known(history.recent, "loss"), history.first_loss
    if moved is None or not losses or not began:
        return ""
    pace = history.facts.num_steps / history.step
    # The mean of losses that go up and down, as with random labels, is where it began too.
    farthest = max(losses, key=lambda loss: abs(loss - began))
    distance = max(map(abs, moved))
    if max(abs(farthest / began - 1), distance) * pace > _UNMOVED:
        return ""
    return f"loss {farthest:.5g} after {began:.5g} at step 1; responses moved by {distance:.1g} nats per token"


def _stuck_at_ln2(history: History) -> str:
    """Find a loss within 1 % of ln 2, where it began, and an accuracy that is chance."""
    loss, began = history.mean("loss"), history.first_loss
    # The loss of step 1 tells the losses that begin there from the others.
    if not _has_waited(history) or loss is None or began is None or abs(began - math.log(2)) > _ROUNDING:
        return ""
    accuracy, num_pairs = history.accuracy_after_warmup
    sure = (accuracy - 0.5) * 2 * math.sqrt(num_pairs)
    if abs(loss / math.log(2) - 1) > _UNMOVED or sure > _CHANCE or _rate_too_low(history):
        return ""
    return f"loss {loss:.4f}, ln 2 is 0.6931; accuracy {100 * accuracy:.0f} % over {num_pairs:,} pairs"


def _has_waited(history: History) -> bool:
    """Tell whether a window ends here, long enough after the warm-up that something should have been learned."""
    facts = history.facts
    waited = facts.warmup_steps + _PATIENCE_WINDOWS * facts.window
    return history.ends_window and history.step >= max(waited, _PATIENCE_SHARE * facts.num_steps)


def _saturated(history: History) -> str:
    """Find gradients that are 2 % of the first ones, and an accuracy of 100 %, with a tenth of the steps to go."""
    facts = history.facts
    left = facts.num_steps - history.step
    accuracy = history.mean("rewards/accuracies") if history.ends_window else None
    if accuracy is None or accuracy < 1 or left < facts.num_steps / 10:
        return ""
    norms, began = _known(history.recent, "grad_norm"), history.largest_first_gradient
    if not norms or (now := statistics.median(norms)) > _VANISHED * began:
        return ""
    margin = history.mean("rewards/margins") or 0.0
    to_go = several(left, "step")
    return f"accuracy 100 %, margin {margin:+.2f}, gradient norm {now:.2g} after {began:.2g}; {to_go} to go"


def _easy_pairs(history: History) -> str:
    """Find an accuracy of 100 % over a window in the first tenth of the first epoch, the opening window left out."""
    facts = history.facts
    early = facts.window < history.step <= _EASY * facts.steps_per_epoch
    learns = any(loss.uses_rejected for loss in facts.losses)
    if not history.ends_window or not early or not learns or (history.mean("rewards/accuracies") or 0) < 1:
        return ""
    seen = history.step * facts.pairs_per_step
    return f"accuracy 100 % over {facts.window} steps, after {seen:,} pairs of {facts.num_pairs:,}"


def _known(rows: Iterable[Row], name: str) -> list[float]:
    """Return a value of rows where it is known."""
    return [value for row in rows if (value := number(row, name)) is not None]


STEP_CHECKS = (
    RunCheck(
        name="both_fall",
        severity="error",
        title="both responses become less likely",
        meaning=(
            "The loss sees the difference of both responses alone. The policy lowers both, the rejected one faster, "
            "and what it says instead is neither of them."
        ),
        remedies=(LOWER_RATE, RAISE_BETA, ADD_SFT, FEWER_STEPS, TRAIN_ADAPTER),
        when=(
            "compared with before step 1, rejected responses are less likely and chosen ones by more than 1 nat per "
            "token: each token is e times less likely. Healthy runs lose some tenths; a pretrained model has 1 to 3 "
            "nats per token on ordinary text"
        ),
        look=_both_fall,
    ),
    RunCheck(
        name="rate_too_high",
        severity="error",
        title="the learning rate is too high",
        meaning="Steps are so large that each undoes more than it gains, or takes the policy far from its reference.",
        remedies=(LOWER_RATE, CHECK_DATA),
        when=(
            "the mean training loss of a window is 20 % above that of step 1 (without a reference: of the first "
            "window), which falls in a healthy run and varies by less than a tenth with the pairs; or chosen "
            "responses lost more than 1 nat per token in the first two windows, about 128 pairs. Rejected ones may: "
            "in the quickstart they do, while chosen ones stay as they were"
        ),
        look=_rate_too_high,
    ),
    RunCheck(
        name="rate_too_low",
        severity="warning",
        title="the policy hardly moves: the learning rate is too low",
        meaning="At this pace the run ends about where it began.",
        remedies=(RAISE_RATE, MORE_STEPS),
        when=(
            "four windows after the warm-up and a quarter into the run: at this pace the loss of no step will have "
            "changed by 1 % at the end, and no responses by 0.01 nats per token, which nobody notices"
        ),
        look=_rate_too_low,
    ),
    RunCheck(
        name="stuck_at_ln2",
        severity="warning",
        title="the loss stays at ln 2, where it began",
        meaning=(
            "The policy moves, but does not learn which response is better: the labels may be random, the responses "
            "alike, or the difference too fine for this model."
        ),
        remedies=(CHECK_DATA, RAISE_RATE),
        when=(
            "four windows after the warm-up and a quarter into the run, the loss is within 1 % of ln 2 and the "
            "accuracy since the warm-up within 3 standard deviations of 50 %: a coin does as well. Only for losses "
            "that begin at ln 2"
        ),
        look=_stuck_at_ln2,
    ),
    RunCheck(
        name="gradient_spike",
        severity="warning",
        title="a gradient is far larger than those before",
        meaning="A few pairs pull harder than all others together, or the policy has become unstable.",
        remedies=(CHECK_DATA, LOWER_RATE, CLIP),
        when=(
            "the norm, before it is clipped, is above 10 times the median of the window before it, and above all of "
            "the first window, so that a hard pair late in a run, when gradients are small, is none. Steps of healthy "
            "runs are within 6 times"
        ),
        look=_gradient_spike,
    ),
    RunCheck(
        name="chosen_falls",
        severity="warning",
        title="chosen responses become less likely while the margin grows",
        meaning="The margin grows because rejected responses fall faster: an early sign of `both_fall`.",
        remedies=(ADD_SFT, RAISE_BETA, LOWER_RATE),
        when=(
            "compared with before step 1, chosen responses lost 0.5 to 1 nat per token and rejected ones more: each "
            "token is 40 % less likely. Healthy runs with `dpo` lose some tenths"
        ),
        look=_chosen_falls,
    ),
    RunCheck(
        name="easy_pairs",
        severity="warning",
        title="every pair is won from the start",
        meaning=(
            "Something simple tells chosen from rejected, such as length, an opening or a format; the policy learns "
            "that and nothing else."
        ),
        remedies=(CHECK_DATA, plain("compare the openings and lengths of both responses")),
        when=(
            "an accuracy of 100 % over a window of at least 64 pairs in the first tenth of the first epoch, the first "
            "window left out. People disagree about a quarter of real pairs; no model wins all of them that early"
        ),
        look=_easy_pairs,
    ),
    RunCheck(
        name="saturated",
        severity="info",
        title="rewards saturate and gradients vanish",
        meaning="All pairs are won by a wide margin: further steps change little, or enlarge margins alone.",
        remedies=(FEWER_STEPS, RAISE_BETA, plain("use more or harder pairs")),
        when=(
            "an accuracy of 100 % over a window, gradients below 2 % of the largest of the first window, and a tenth "
            "of the steps or more to go. With `dpo`, 2 % is the slope at a margin of about 4"
        ),
        look=_saturated,
    ),
)
"""All that is looked for, the gravest first."""
