"""The learner: what changes from step to step, and the generator that takes the steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from dpo_cli.data.prepared.step_plan import MicroBatch, Plan, Step
from dpo_cli.modeling.ahead import prepared_ahead
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses.base import Statistics
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import OpenReference
from dpo_cli.preference.scoring import ExpertLoad, score_pairs, score_step, step_info
from dpo_cli.training.recuts import Recuts
from dpo_cli.training.resharding import OPTIMIZER, REFERENCE
from dpo_cli.training.state import (
    LearnerState,
    check_fits,
    optimizer_to_tensors,
    random_states,
    rates_at,
    restore_random_states,
)
from dpo_cli.training.step_sums import StepFigures, StepSums

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR

PairsAndLosses = tuple[tuple[int, ...], "Tensor"]
"""The indices of some pairs, and the loss of each."""


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
        broken: What was not finite, where the step was skipped for it and the weights did not move; or None.
    """

    number: int
    epoch: float
    metrics: dict[str, float]
    num_tokens: int
    stop: bool
    pairs: tuple[int, ...]
    broken: NotFinite | None = None


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


@dataclass
class Learner:
    """All that a step changes, and what it takes to take one.

    Attributes:
        policy: What is trained, placed already.
        objective: Loss and rewards of pairs.
        reference: Answers with the reference's token log-probabilities.
        optimizer: What Accelerate prepared of an optimizer.
        rates: The learning rate; not prepared, since a prepared one steps once per process.
        accelerator: Synchronises ranks; its `gradient_accumulation_steps` must be 1.
        max_grad_norm: Where gradients are clipped, or None.
        skips: The steps that were not taken.
        recuts: The steps that were cut again since memory ran out.
        statistics: What the objective keeps from step to step.
        asked_to_stop: Whether this process was asked to stop; looked at once a step.
    """

    policy: Policy
    objective: Objective
    reference: OpenReference
    optimizer: Any
    rates: LambdaLR
    accelerator: Accelerator
    max_grad_norm: float | None = None
    skips: Skips = field(default_factory=lambda: Skips(0))
    recuts: Recuts = field(default_factory=Recuts)
    statistics: Statistics = field(default_factory=dict)
    asked_to_stop: Callable[[], bool] = lambda: False

    @property
    def done(self) -> int:
        """How many steps were taken or skipped."""
        return self.rates.last_epoch

    def steps(self, plan: Plan, batches: Batches) -> Generator[StepResult, None, None]:
        """Take the steps of a plan that are not done yet, yielding a result after each.

        Args:
            plan: All steps of the run.
            batches: Cuts their pairs and makes micro-batches into tensors on the device.

        Raises:
            NotFinite: A step would have spoiled the weights, and may not be skipped. It was not taken.
        """
        rank = data_rank(self.accelerator)
        while self.done < plan.num_steps:
            at_hand = self.reference.beside(self.recuts.batches(batches, self.done + 1))
            steps = functools.partial(plan.steps, at_hand.cut, self.done, *rank)
            with prepared_ahead(at_hand, self._asked_for(steps())) as prepared:
                for step in steps():
                    if self.recuts.batches(batches, step.number).micro_batch_tokens != at_hand.micro_batch_tokens:
                        break
                    result = self._take_or_recut(step, prepared)
                    if result is None:
                        break
                    yield result

    def _asked_for(self, steps: Iterable[Step]) -> Iterator[MicroBatch]:
        """Yield the micro-batches of steps in the order in which passes ask for them."""
        for step in steps:
            yield from step.micro_batches * (2 if self._looks_first(step) else 1)

    def _looks_first(self, step: Step) -> bool:
        """Tell whether something depends on the whole step, so that passes without gradient come first."""
        several = len(step.micro_batches) > 1 or data_rank(self.accelerator).num_ranks > 1
        return several and (self.objective.compares_pairs or self.objective.router_aux > 0)

    def _take_or_recut(self, step: Step, batches: Batches) -> StepResult | None:
        """Take one step; or, where memory runs out in its passes on any rank, undo them and let it be cut again.

        A rank on which it did still takes part in what the ranks exchange, so that none waits for it.

        Returns:
            The result, or None where the step has to be taken again.
        """
        if not self.recuts.allowed:
            return self.take(step, batches)
        random, failure = random_states(self.accelerator.process_index), None
        self.policy.begin_step()
        try:
            sums, losses, further = self._add_up_gradients(step, batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback holds what was computed.
            failure = error.with_traceback(None)
        if failure:
            self._return_memory()
            self.policy.rejoin()
            (sums, losses, further) = StepSums(self.accelerator.device, ran_out=True), [], {}
        figures = self._read(sums, further)
        if not figures.ran_out:
            return self._finish(step, figures, losses)
        self.recuts.halve(step, batches, self.accelerator, failure)
        self.optimizer.zero_grad()
        restore_random_states(random, self.accelerator.process_index)
        self._return_memory()
        return None

    def _return_memory(self) -> None:
        """Return what no tensor takes any more to the device."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def take(self, step: Step, batches: Batches) -> StepResult:
        """Take one step.

        Raises:
            NotFinite: It would have spoiled the weights, and may not be skipped. It was not taken.
        """
        sums, losses, further = self._add_up_gradients(step, batches)
        return self._finish(step, self._read(sums, further), losses)

    def _read(self, sums: StepSums, further: dict[str, Tensor]) -> StepFigures:
        """Clip what was added up, and read the figures of the step: its one wait for device and ranks."""
        if self.asked_to_stop():
            sums.ask_to_stop()
        # A scaler unscales what is clipped, and must be asked for a step then: with one the loss is looked at before.
        norms = {} if self.accelerator.scaler else {"grad_norm": self.policy.clip(self.max_grad_norm)}
        return sums.read(self.accelerator, {**further, **norms})

    def _finish(self, step: Step, figures: StepFigures, losses: Sequence[PairsAndLosses]) -> StepResult:
        """Move the weights by the gradients that were added up.

        Raises:
            NotFinite: As `take`.
        """
        scaler = self.accelerator.scaler
        metrics, broken, norm = figures.means | figures.further, None, math.nan
        if not math.isfinite(metrics["loss"]):
            broken = NotFinite(step.number, tuple(sorted(gather_object(_not_finite(losses)))), "loss")
        else:
            norm = float(self.policy.clip(self.max_grad_norm)) if scaler else metrics["grad_norm"]
            # In float16 the gradient scaler expects overflows, skips their steps and lowers its scale, down to 1.
            if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
                broken = NotFinite(step.number, step.pairs, "gradient")
        if broken and not self.skips.take():
            raise broken
        metrics |= {"grad_norm": norm, "learning_rate": float(self.rates.get_last_lr()[0])}
        # A scaler has to be told of every gradient that it unscaled; it leaves out by itself what overflowed.
        if not broken or (scaler is not None and broken.what == "gradient"):
            self.optimizer.step()
        if not broken:
            self.statistics.update(self.objective.after_step(self.statistics, metrics))
        self.rates.step()
        self.optimizer.zero_grad()
        self.reference.after_step(step.number)
        return StepResult(step.number, step.epoch, metrics, figures.num_tokens, figures.stop, step.pairs, broken)

    def _add_up_gradients(
        self, step: Step, batches: Batches
    ) -> tuple[StepSums, list[PairsAndLosses], dict[str, Tensor]]:
        """Run this rank's micro-batches forward and backward, without waiting for the device.

        Returns:
            Their sums, their pairs' losses, and metrics of the whole step.
        """
        objective, reference, accelerator = self.objective, self.reference, self.accelerator
        sums, all_losses = StepSums(accelerator.device), []
        info = step_info(batches.pairs.sizes, step.pairs, self.statistics, accelerator)
        scored, experts = None, ExpertLoad(self.policy.scorer) if objective.router_aux else None
        ask = experts or self.policy.scorer
        if self._looks_first(step):
            if objective.compares_pairs:
                scored = iter(score_step(ask, objective, reference, batches, step.micro_batches, info, accelerator))
            elif experts:
                experts.observe(map(batches, step.micro_batches))
            if experts:
                experts.gather(accelerator)
        for place, micro_batch in enumerate(step.micro_batches, 1):
            with self.policy.adding_up(last=place == len(step.micro_batches)):
                batch = batches(micro_batch)
                if micro_batch.filler:
                    # It keeps this rank in step with the others; its weight is 0.
                    pull = ask(batch).sum()
                    if scored is None:
                        reference(batch)
                elif scored is None:
                    pairs, values = score_pairs(ask, objective, reference, batch, info)
                    losses, pull = pairs.losses, pairs.losses.sum()
                else:
                    found = next(scored)
                    losses, values, pull = found.losses, found.values, (found.slopes * ask(batch)).sum()
                if experts:
                    # The loss of a step is a mean over its pairs, to which this is added as it is.
                    pull = pull + objective.router_aux * step.num_pairs * experts.share()
                # Gradients are averaged over ranks, so the step's sum is restored before it is divided.
                weight = 0.0 if micro_batch.filler else data_rank(accelerator).num_ranks / step.num_pairs
                accelerator.backward(pull * weight)
            if not micro_batch.filler:
                sums.add(values, batch.num_tokens)
                all_losses.append((batch.pairs, losses.detach()))
        return sums, all_losses, {"router_aux": experts.loss()} if experts else {}

    def state(self) -> LearnerState:
        """Look at what steps change, the policy's weights aside, as it is now; nothing is copied."""
        scaler, moving = self.accelerator.scaler, self.reference.moving
        optimizer, groups = optimizer_to_tensors(self.optimizer.state_dict())
        return LearnerState(
            step=self.done,
            tensors={OPTIMIZER: optimizer, **({REFERENCE: moving.weights.tensors()} if moving else {})},
            groups=groups,
            statistics=dict(self.statistics),
            skipped=self.skips.count,
            scaler=scaler.state_dict() if scaler else None,
        )

    def restore(self, state: LearnerState) -> None:
        """Go on from a state; the policy's weights are restored by the policy.

        Raises:
            ValueError: What optimizer or reference kept does not fit these weights.
        """
        moments = state.moments()
        check_fits(moments["state"], self.optimizer)
        self.optimizer.load_state_dict(moments)
        # The schedule is a function of the step; one of more steps than it was saved under goes on at its own rate.
        rates = rates_at(self.rates, state.step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.reference.moving:
            self.reference.moving.weights.set_tensors(state.tensors[REFERENCE])
        self.statistics.update(state.statistics)
        self.skips.count = state.skipped
        self.rates.last_epoch, self.rates._last_lr = state.step, rates
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)


def _not_finite(all_losses: Iterable[PairsAndLosses]) -> list[int]:
    """Return the pairs whose loss is NaN or infinite."""
    return [
        index
        for indices, losses in all_losses
        for index, fine in zip(indices, torch.isfinite(losses).tolist(), strict=True)
        if not fine
    ]
