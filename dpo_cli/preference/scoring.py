"""Policy, reference and objective together over pairs: what training and evaluation share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.modeling.batch import Batches, PairBatch
from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.precision import precision_of
from dpo_cli.modeling.responses import Responses
from dpo_cli.modeling.routing import balance_loss
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.modeling.sending import sent, with_tensors
from dpo_cli.preference.losses.base import PairLosses, Statistics, StepInfo
from dpo_cli.preference.metrics import pair_values
from dpo_cli.preference.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dpo_cli.data.prepared.step_plan import PairSizes

FurtherValues = Callable[[SequenceLogps, SequenceLogps | None, float], Tensor]
"""Returns what is known of B pairs beside their `pair_values`, `[B, …]`, as `held_out_values` does."""


class ExpertLoad:
    """A scorer that also adds up, over a step, how the policy's experts are loaded.

    Args:
        scorer: A `Scorer` of a policy with routers, or what Accelerate prepared of one.
    """

    def __init__(self, scorer: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._scorer = scorer
        self._loads: list[Tensor] = []
        self._whole: Tensor | None = None

    def __call__(self, batch: PairBatch) -> Tensor:
        """Return what the scorer does."""
        logps, load = self._scorer(batch, with_load=True)
        self._loads.append(load)
        return logps

    @torch.no_grad()
    def observe(self, batches: Iterable[PairBatch]) -> None:
        """Score batches for their load alone."""
        for batch in batches:
            self(batch)

    def gather(self, accelerator: Accelerator) -> None:
        """Take the batches so far, with those of other ranks, as the whole step."""
        loads = torch.stack(self._loads).detach()
        if data_rank(accelerator).num_ranks > 1:
            loads = torch.stack(gather_object(list(loads.cpu()))).to(loads.device)
        self._whole, self._loads = loads.sum(0), []

    def share(self) -> Tensor:
        """Return the last batch's share of the step's load-balancing loss; all of it if none was gathered."""
        load = self._loads.pop()
        if self._whole is None:
            self._whole = load.detach()
        return balance_loss(load, self._whole)

    def loss(self) -> Tensor:
        """Return the load-balancing loss of the whole step."""
        assert self._whole is not None, "no batch was scored"
        return balance_loss(self._whole, self._whole)


def step_info(sizes: PairSizes, pairs: Sequence[int], statistics: Statistics, accelerator: Accelerator) -> StepInfo:
    """Return what a loss knows of a step of these pairs, in the precision of an accelerator."""
    tie = precision_of(accelerator.mixed_precision).tie
    return StepInfo(len(pairs), int(sizes.chosen_scored[list(pairs)].sum()), statistics=statistics, tie=tie)


def score_pairs(
    scorer: BatchScorer,
    objective: Objective,
    reference: BatchScorer,
    batch: PairBatch,
    step: StepInfo,
    further: FurtherValues | None = None,
) -> tuple[PairLosses, Tensor]:
    """Score a micro-batch with policy and reference, and apply the objective.

    Args:
        scorer: A `Scorer`, or what Accelerate prepared of one.
        objective: Loss and rewards of pairs.
        reference: Returns the reference's token log-probabilities.
        batch: B pairs.
        step: The step that they belong to.
        further: What to compute of the pairs besides; None: nothing.

    Returns:
        Losses and rewards, and the `pair_values`, `[B, 9]`, with further ones behind them.
    """
    policy, of_reference = (
        SequenceLogps.of(scorer(batch), batch.responses),
        SequenceLogps(reference(batch), batch.responses),
    )
    step = dataclasses.replace(step, margins=batch.margins)
    return _apply(objective, policy, of_reference, step, batch.weights, further)


@dataclass(frozen=True)
class ScoredMicroBatch:
    """One micro-batch of a step whose pairs are compared with each other.

    Attributes:
        pairs: The pairs' indices in the data, `B` of them.
        losses: `[B]`, without gradient.
        values: The `pair_values`, `[B, 9]`, with further ones behind them.
        slopes: The gradient of the sum of the step's losses by the scorer's output, of the same shape.
    """

    pairs: tuple[int, ...]
    losses: Tensor
    values: Tensor
    slopes: Tensor


def score_step(
    scorer: BatchScorer,
    objective: Objective,
    reference: BatchScorer,
    batches: Batches,
    micro_batches: Iterable[MicroBatch],
    step: StepInfo,
    accelerator: Accelerator,
    further: FurtherValues | None = None,
) -> list[ScoredMicroBatch]:
    """Apply an objective to all pairs of a step at once, those of other ranks included.

    The log-probabilities of all micro-batches are computed without gradient and put together, since the losses of
    one depend on the others'. By the chain rule the loss's slopes are then all that a second pass over a
    micro-batch needs for its share of the gradient.

    Args:
        scorer: A `Scorer`, or what Accelerate prepared of one.
        objective: Loss and rewards of pairs.
        reference: Returns the reference's token log-probabilities.
        batches: Makes micro-batches into tensors.
        micro_batches: This rank's share of the step.
        step: The step.
        accelerator: Knows the ranks.
        further: What to compute of the pairs besides; None: nothing.

    Returns:
        One for each of this rank's micro-batches that is no filler.
    """
    mine, rank = [], data_rank(accelerator).rank
    for micro_batch in micro_batches:
        batch = batches(micro_batch)
        with torch.no_grad():
            parts = (scorer(batch), reference(batch), batch.weights, batch.margins)
        if not micro_batch.filler:
            mine.append(_MicroBatchLogps(rank, batch.pairs, batch.lengths, *parts))
    scored = _of_all_ranks(mine, accelerator)
    halves = (half for side in zip(*(part.halves() for part in scored), strict=True) for half in side)
    responses = Responses.of(list(itertools.chain.from_iterable(halves)))
    logps, of_reference = (
        _joined([getattr(part, name) for part in scored], scored) for name in ("policy", "reference")
    )
    logps, responses = logps.requires_grad_(), sent(responses, logps.device)
    weights, margins = (torch.cat([getattr(part, name) for part in scored]) for name in ("weights", "margins"))
    both = SequenceLogps.of(logps, responses), SequenceLogps(of_reference, responses)
    pairs, values = _apply(objective, *both, dataclasses.replace(step, margins=margins), weights, further)
    (slopes,) = torch.autograd.grad(pairs.losses.sum(), logps)
    shares = zip(
        _parted(slopes, scored),
        *(t.split([len(p.weights) for p in scored]) for t in (pairs.losses.detach(), values)),
        strict=True,
    )
    return [
        ScoredMicroBatch(part.pairs, *(tensor.to(accelerator.device) for tensor in (losses, rows, slopes)))
        for part, (slopes, losses, rows) in zip(scored, shares, strict=True)
        if part.rank == rank
    ]


@dataclass(frozen=True)
class _MicroBatchLogps:
    """A micro-batch as it is sent to the other ranks; tensors as in `PairBatch` and from a `Scorer`."""

    rank: int
    pairs: tuple[int, ...]
    lengths: tuple[int, ...]
    policy: Tensor
    reference: Tensor
    weights: Tensor
    margins: Tensor

    def halves(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the lengths of the chosen and those of the rejected responses."""
        return self.lengths[: len(self.weights)], self.lengths[len(self.weights) :]


def _of_all_ranks(mine: list[_MicroBatchLogps], accelerator: Accelerator) -> list[_MicroBatchLogps]:
    """Return the micro-batches of all ranks, on the CPU; those of a rank alone stay where they are."""
    if data_rank(accelerator).num_ranks == 1:
        return mine
    gathered: list[_MicroBatchLogps] = gather_object([with_tensors(part, Tensor.cpu) for part in mine])
    return gathered


def _joined(logps: Sequence[Tensor], scored: Sequence[_MicroBatchLogps]) -> Tensor:
    """Join `[…, N]` of several micro-batches: all of their chosen responses, then all of their rejected ones."""
    halves = [whole.split([sum(half) for half in part.halves()], -1) for whole, part in zip(logps, scored, strict=True)]
    return torch.cat([half for side in zip(*halves, strict=True) for half in side], -1)


def _parted(joined: Tensor, scored: Sequence[_MicroBatchLogps]) -> list[Tensor]:
    """Undo `_joined`."""
    sizes = [sum(half) for side in zip(*(part.halves() for part in scored), strict=True) for half in side]
    pieces = joined.split(sizes, -1)
    return [torch.cat(sides, -1) for sides in zip(pieces[: len(scored)], pieces[len(scored) :], strict=True)]


def _apply(
    objective: Objective,
    policy: SequenceLogps,
    reference: SequenceLogps,
    step: StepInfo,
    weights: Tensor,
    further: FurtherValues | None,
) -> tuple[PairLosses, Tensor]:
    """Apply the objective and the pairs' own weights."""
    pairs = objective(policy, reference, step)
    pairs = dataclasses.replace(pairs, losses=weights * pairs.losses)
    values = pair_values(pairs.losses, pairs.chosen_rewards, pairs.rejected_rewards, policy, step.tie)
    if further is not None:
        more = further(policy, reference if objective.needs_reference else None, step.tie)
        values = torch.cat([values, more], dim=1)
    return pairs, values
