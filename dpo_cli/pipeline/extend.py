"""A run that is resumed with more steps than it was started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import UserError
from dpo_cli.training.checkpoints import newest_step
from dpo_cli.training.optimizer import rate_factor
from dpo_cli.training.run_folder import RunFolder, RunState


def check_length(config: Config, folder: RunFolder, plan: Plan, *, extend: bool) -> str | None:
    """Compare the number of steps of a run that is to be resumed with the number that it was started with.

    Args:
        config: The settings that it is resumed under.
        folder: The run.
        plan: The steps under these settings.
        extend: Whether it may go on where the learning rate of steps that were taken would have been another.

    Returns:
        What is to be said where the run is extended, or None.

    Raises:
        UserError: It would have fewer steps; or it has no checkpoint to be extended from; or `extend` is needed.
    """
    length, done = folder.recorded_length(), newest_step(folder.checkpoints)
    finished = folder.state() is RunState.FINISHED
    if length is None or not (done or finished):
        return None
    before, now = dataclasses.replace(plan, epochs=length[0], max_steps=length[1]).num_steps, plan.num_steps
    if now == before:
        return None
    if now < before:
        what = f"a run cannot be resumed with fewer steps: it was started with {before:,}, and {now:,} are asked for"
        hint = "set `training.epochs` and `training.max_steps` back, or start a new run in another `output_dir`"
        raise UserError(what, str(folder.config), hint)
    if not done:
        hint = "start again with `--overwrite`; `checkpoints.at_end: true` keeps the state after the last step"
        raise UserError("the run cannot be extended: it has no checkpoint", str(folder.checkpoints), hint)
    training = config.training
    old, new = (rate_factor(training.schedule, training.warmup_ratio, steps) for steps in (before, now))
    longer = f"extending the run from {before:,} to {now:,} steps"
    if all(old(step) == new(step) for step in range(done)):
        return f"{longer}: the same as a run that was started with {now:,}"
    course = _course(old, new, training.learning_rate, done, now)
    if extend:
        return f"{longer}; {course}"
    what = f"the learning rate of the first {done:,} steps would have been another in a run of {now:,} steps"
    hint = (
        f"`--extend` goes on all the same: {course}; for {now:,} steps of one schedule start again with `--overwrite`"
    )
    raise UserError(what, str(folder.config), hint)


def _course(old: Callable[[int], float], new: Callable[[int], float], rate: float, done: int, steps: int) -> str:
    """Say what the learning rate was at the last step taken, and what it is from then on."""
    was, then, last = (rate * share for share in (old(done - 1), new(done), new(steps - 1)))
    return f"the learning rate was {was:.2g} at step {done:,}; it is {then:.2g} at the next and {last:.2g} at the last"
