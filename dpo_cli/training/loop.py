"""The loop: a generator that yields one `StepResult` per optimizer step and knows nothing of what is done with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from dpo_cli.data.prepared.step_plan import Step
from dpo_cli.modeling.batch import Batches
from dpo_cli.preference.losses.base import Memory
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import OpenReference
from dpo_cli.preference.scoring import ExpertWatch, score_pairs, score_step, step_info
from dpo_cli.training.step_sums import StepSums

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, after it was taken.

    Attributes:
        number: Counted from 1 over the whole run.
        epoch: Passes over the data completed.
        metrics: Means over the step's pairs, all ranks together, with `grad_norm` and `learning_rate`.
        num_tokens: Tokens of all ranks' forward passes, without padding.
        stop: Whether any rank was asked to stop.
        pairs: The step's pairs.
        taken: Whether the weights moved; not where loss or gradient was not finite and the step could be skipped.
    """

    number: int
    epoch: float
    metrics: dict[str, float]
    num_tokens: int
    stop: bool
    pairs: tuple[int, ...]
    taken: bool


class NotFinite(Exception):
    """A loss, a gradient or the weights were NaN or infinite.

    Attributes:
        step: The step's number.
        pairs: The pairs whose loss was not finite; all of the step's where only gradient or weights were not.
        what: `loss`, `gradient` or `weights`.
    """

    def __init__(self, step: int, pairs: tuple[int, ...], what: str) -> None:
        super().__init__(f"the {what} of step {step} {'are' if what == 'weights' else 'is'} not finite")
        self.step, self.pairs, self.what = step, pairs, what


@dataclass
class Skips:
    """Steps that were not taken because loss or gradient was not finite.

    Attributes:
        allowed: How many there may be.
        count: How many there were.
    """

    allowed: int
    count: int = 0

    def take(self) -> bool:
        """Count one more, and tell whether it is allowed."""
        self.count += 1
        return self.count <= self.allowed


def train_steps(
    scorer: nn.Module,
    objective: Objective,
    reference: OpenReference,
    optimizer: Any,
    schedule: LambdaLR,
    steps: Iterable[Step],
    batches: Batches,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    memory: Memory,
    asked_to_stop: Callable[[], bool],
    may_skip: Callable[[NotFinite], bool] = lambda broken: False,
) -> Iterator[StepResult]:
    """Take optimizer steps, yielding a result after each.

    Args:
        scorer: What Accelerate prepared of a `Scorer`.
        objective: Loss and rewards of pairs.
        reference: Answers with the reference's token log-probabilities.
        optimizer: What Accelerate prepared of an optimizer.
        schedule: The learning rate; not prepared, since a prepared one steps once per process.
        steps: The plan, from the step at hand on.
        batches: Makes a micro-batch into tensors on the device.
        accelerator: Synchronises ranks; its `gradient_accumulation_steps` must be 1.
        max_grad_norm: Where gradients are clipped, or None.
        memory: What the objective keeps from step to step; changed in place.
        asked_to_stop: Whether this process was asked to stop; looked at once a step.
        may_skip: Whether a step whose loss or gradient is not finite may be left out; asked on all ranks alike.

    Raises:
        NotFinite: Such a step may not be left out. It was not taken.
    """
    for step in steps:
        sums, not_finite, further = _add_up_gradients(step, scorer, objective, reference, batches, accelerator, memory)
        if asked_to_stop():
            sums.ask_to_stop()
        metrics, num_tokens, stop = sums.reduce(accelerator)
        broken, norm = None, math.nan
        if not math.isfinite(metrics["loss"]):
            broken = NotFinite(step.number, tuple(sorted(gather_object(not_finite))), "loss")
        else:
            norm = float(accelerator.clip_grad_norm_(scorer.parameters(), max_grad_norm or math.inf))
            # In float16 the gradient scaler expects overflows, skips their steps and lowers its scale, down to 1.
            if not math.isfinite(norm) and (accelerator.scaler is None or accelerator.scaler.get_scale() < 1):
                broken = NotFinite(step.number, step.pairs, "gradient")
        if broken and not may_skip(broken):
            raise broken
        metrics |= {**further, "grad_norm": norm, "learning_rate": float(schedule.get_last_lr()[0])}
        # A scaler has to be told of every gradient that it unscaled; it leaves out by itself what overflowed.
        if not broken or (accelerator.scaler is not None and broken.what == "gradient"):
            optimizer.step()
        if not broken:
            memory.update(objective.after_step(memory, metrics))
        schedule.step()
        optimizer.zero_grad()
        reference.after_step(step.number)
        yield StepResult(step.number, step.epoch, metrics, num_tokens, stop, step.pairs, broken is None)


def _add_up_gradients(
    step: Step,
    scorer: nn.Module,
    objective: Objective,
    reference: OpenReference,
    batches: Batches,
    accelerator: Accelerator,
    memory: Memory,
) -> tuple[StepSums, list[int], dict[str, float]]:
    """Run this rank's micro-batches forward and backward.

    Returns:
        Their sums, the pairs whose loss is not finite, and metrics of the whole step.
    """
    sums, not_finite = StepSums(accelerator.device), []
    info = step_info(batches.pairs.sizes, step.pairs, memory)
    scored, watch = None, ExpertWatch(scorer) if objective.router_aux else None
    ask = watch or scorer
    if len(step.micro_batches) > 1 or accelerator.num_processes > 1:
        # What depends on the whole step takes a pass without gradient before the first one with it.
        if objective.looks_at_step:
            scored = iter(score_step(ask, objective, reference, batches, step.micro_batches, info, accelerator))
        elif watch:
            watch.look_at(batches(micro_batch) for micro_batch in step.micro_batches if not micro_batch.filler)
        if watch:
            watch.settle()
    for place, micro_batch in enumerate(step.micro_batches, 1):
        last = place == len(step.micro_batches)
        # Ranks may have different numbers of micro-batches; gradients are exchanged once, on the last.
        with contextlib.nullcontext() if last else accelerator.no_sync(scorer):
            batch = batches(micro_batch)
            if scored is None or micro_batch.filler:
                pairs, values = score_pairs(ask, objective, reference, batch, info)
                losses, pull = pairs.losses, pairs.losses.sum()
            else:
                found = next(scored)
                losses, values, pull = found.losses, found.values, (found.slopes * ask(batch)).sum()
            if watch:
                # The loss of a step is a mean over its pairs, to which this is added as it is.
                pull = pull + objective.router_aux * step.num_pairs * watch.share()
            # Gradients are averaged over ranks, so the step's sum is restored before it is divided.
            weight = 0.0 if micro_batch.filler else accelerator.num_processes / step.num_pairs
            accelerator.backward(pull * weight)
        if not micro_batch.filler:
            sums.add(values, batch.num_tokens)
            not_finite += _not_finite(batch.pairs, losses)
    return sums, not_finite, {"router_aux": watch.loss()} if watch else {}


def _not_finite(indices: tuple[int, ...], losses: Tensor) -> list[int]:
    """Return the pairs whose loss is NaN or infinite."""
    return [index for index, fine in zip(indices, torch.isfinite(losses).tolist(), strict=True) if not fine]
