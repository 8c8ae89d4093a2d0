"""How a run begins in its folder: anew, in place of an older one, or from a checkpoint, maybe with more steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_cli.config import Config, resolved_yaml
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.evaluation.best import best_step, exhausted
from dpo_cli.modeling.weights import START_ADAPTER
from dpo_cli.pipeline.session import Session
from dpo_cli.reporting.environment import environment
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.reporting.trackers import TrackedRun, start_trackers
from dpo_cli.system.storage import discard, make_folder, remove_strays, write_text
from dpo_cli.system.text import several
from dpo_cli.training.checkpoints import newest_step, newest_whole
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import rate_factor
from dpo_cli.training.recorded_settings import RESOLVED
from dpo_cli.training.run_folder import STARTS, RunFolder, RunState
from dpo_cli.training.state import TrainingState, restore_checkpoint


def begin(
    session: Session,
    folder: RunFolder,
    learner: Learner,
    fingerprints: Mapping[str, str],
    noted: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> TrainingState | None:
    """Make the run's folder ready and restore the newest checkpoint.

    Args:
        session: Says what runs.
        folder: Where.
        learner: What is restored.
        fingerprints: Digests of what a checkpoint has to have been started from.
        noted: What is noted of the run beside its environment.
        resume: Whether it goes on from what is there.
        overwrite: Whether what is there is removed.

    Returns:
        The checkpoint's record, where there is one.

    Raises:
        UserError: The disk refuses, a checkpoint does not fit, or a tracker does not start.
    """
    checkpoint: Path | None = None
    if resume and session.accelerator.is_main_process:
        adapter = session.config.adapter
        sources = {START_ADAPTER: adapter.start if adapter else None}
        checkpoint = newest_whole(folder.checkpoints, fingerprints, sources)
    checkpoint = session.agreed(checkpoint)
    # What is there is kept until it is known that the run can go on from it.
    restored = restore_checkpoint(checkpoint, learner) if checkpoint else None
    if session.accelerator.is_main_process:
        starts = _starts(folder, learner.done) if resume else [_start(0)]
        _write_down(session, folder, {**noted, STARTS: starts}, resume=resume, overwrite=overwrite)
        if not learner.recuts.allowed:
            # Passes have the size that was asked for, from here on.
            folder.recuts.unlink(missing_ok=True)
    tracked = TrackedRun(folder.path.absolute().name, folder.trackers, learner.done)
    start_trackers(session.accelerator, session.config.trackers, session.config.model_dump(mode="json"), tracked)
    if restored:
        session.console.notice(f"resuming after step {restored.step}: {checkpoint}")
    elif resume:
        session.console.notice("no checkpoint yet: starting from step 1")
    return restored


def _starts(folder: RunFolder, done: int) -> list[dict[str, Any]]:
    """Return after which step, and when, the run was started or resumed, this time included.

    What was resumed later than this time is forgotten, as its rows are.
    """
    try:
        known = json.loads(folder.environment.read_bytes())[STARTS]
        earlier = [{"after_step": one["after_step"], "at": one["at"]} for one in known if one["after_step"] < done]
    except (OSError, ValueError, LookupError, TypeError):
        earlier = []
    return [*earlier, _start(done)]


def _start(done: int) -> dict[str, Any]:
    return {"after_step": done, "at": datetime.now(UTC).isoformat(timespec="seconds")}


def _write_down(
    session: Session, folder: RunFolder, noted: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Clear the run's folder if that was asked for, and write down what runs and where.

    Raises:
        UserError: The disk refuses, or another run began in the folder meanwhile.
    """
    described = json.dumps({**environment(session.accelerator), **noted}, indent=1)
    try:
        if meanwhile := folder.check(resume=resume, overwrite=overwrite):
            raise meanwhile
        if overwrite:
            folder.clear()
        elif folder.state() is RunState.FINISHED:
            # It is extended. Were it interrupted with its old model in place, it would count as finished.
            discard(folder.final)
        make_folder(folder.path)
        remove_strays(folder.path)
        remove_strays(folder.checkpoints)
        write_text(folder.config, RESOLVED + resolved_yaml(session.config))
        write_text(folder.environment, described + "\n")
    except OSError as error:
        raise from_os_error(error, "preparing the output folder", str(folder.path)) from error


def check_length(config: Config, folder: RunFolder, plan: Plan, *, extend: bool) -> str | None:
    """Compare the number of steps of a run that is to be resumed with the number that it was started with.

    Args:
        config: The settings that it is resumed under.
        folder: The run.
        plan: The steps under these settings.
        extend: Whether it may go on where the learning rate of steps that were taken would have been another.

    Returns:
        What is to be said where the run is extended, or goes on although its patience had ended it; or None.

    Raises:
        UserError: It would have fewer steps; or it has no checkpoint to be extended from; or `extend` is needed.
    """
    length, done = folder.recorded.length(), newest_step(folder.checkpoints)
    finished = folder.state() is RunState.FINISHED
    if length is None or not (done or finished):
        return None
    before, now = dataclasses.replace(plan, epochs=length[0], max_steps=length[1]).num_steps, plan.num_steps
    if now == before:
        return _goes_on(config, folder, now) if finished else None
    if finished and ended_early(config, folder, before):
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
    longer = f"extending the run from {before:,} to {several(now, 'step')}"
    if all(old(step) == new(step) for step in range(done)):
        return f"{longer}: the same as a run that was started with {now:,}{_also_evaluated(config, before, done)}"
    course = _course(old, new, training.learning_rate, done, now)
    if extend:
        return f"{longer}; {course}"
    taken, steps = several(done, "step"), several(now, "step")
    what = f"the learning rate of the first {taken} would have been different in a run of {steps}"
    hint = f"`--extend` continues anyway: {course}; for {steps} of one schedule, start again with `--overwrite`"
    raise UserError(what, str(folder.config), hint)


def _also_evaluated(config: Config, before: int, done: int) -> str:
    """Name the evaluation of a run's old end, if a longer run would not have had it, and the best one is asked for."""
    every = config.evaluation.every_steps
    if config.evaluation.best_by is None or done < before or (every and before % every == 0):
        return ""
    return f", but that the evaluation after step {before:,} counts for `evaluation.best_by` too"


def ended_early(config: Config, folder: RunFolder, num_steps: int) -> str | None:
    """Say how a finished run can be continued that its patience has ended, by the settings of now; None: it has not.

    Args:
        config: The settings.
        folder: The run.
        num_steps: How many steps it would have had.
    """
    rows, by, patience = rows_in(folder.metrics), config.evaluation.best_by, config.evaluation.patience
    last = _last_step(rows)
    if last >= num_steps or by is None or not exhausted(rows, by, patience):
        return None
    best = best_step(rows, by)
    evaluations = several(patience or 0, "evaluation was", "evaluations were")
    stopped = f"it stopped after step {last} of {num_steps}: {evaluations} no better by {by} than step {best}"
    return f"{stopped}; to continue it, raise `evaluation.patience`"


def _goes_on(config: Config, folder: RunFolder, num_steps: int) -> str | None:
    """Say that a finished run goes on that its patience had ended and now does not; None: it is finished."""
    had_patience = folder.recorded.count("evaluation.patience") is not None
    last, done = _last_step(rows_in(folder.metrics)), newest_step(folder.checkpoints)
    if not (had_patience and done and 0 < last < num_steps) or ended_early(config, folder, num_steps):
        return None
    return f"the run had stopped after step {last}: with the `evaluation.patience` of now it takes more steps"


def _last_step(rows: list[dict[str, Any]]) -> int:
    return max((row["step"] for row in rows), default=0)


def _course(old: Callable[[int], float], new: Callable[[int], float], rate: float, done: int, steps: int) -> str:
    """Say what the learning rate was at the last step taken, and what it is from then on."""
    was, then, last = (rate * share for share in (old(done - 1), new(done), new(steps - 1)))
    return f"the learning rate was {was:.2g} at step {done:,}; it is {then:.2g} at the next and {last:.2g} at the last"
