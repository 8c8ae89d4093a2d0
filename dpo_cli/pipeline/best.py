"""The best checkpoint of a run: which evaluations save one, when the run stops, and which one `final/` is in the end.

The main process decides by its rows of metrics.jsonl, and tells the others.
"""

from __future__ import annotations

from pathlib import Path

from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.best import Outcome, exhausted, is_better
from dpo_cli.pipeline.run import Records, Run
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.checkpoints import check_whole

_WITHOUT = "evaluation.best_by=null evaluation.patience=null checkpoints.keep_best=0"
_INSTEAD = f"`--resume {_WITHOUT}` takes all steps, and `final/` is what the last one leaves"


def check_evaluations(run: Run, records: Records, *, damaged: bool) -> None:
    """Check that a run that goes on knows its evaluations so far, and say so where the best has no checkpoint.

    Args:
        run: The run.
        records: Its rows.
        damaged: Whether rows are missing or changed; the main process has to know.

    Raises:
        UserError: They are.
    """
    session, folder = run.session, run.plan.folder
    if (by := session.config.evaluation.best_by) is None:
        return
    if session.agreed(damaged):
        what = f"rows are missing or changed that were there at step {run.learner.done}: the best step is not known"
        hint = f"restore the file; or {_INSTEAD}"
        raise UserError(what, str(folder.metrics), hint, status=FAILED)
    if records.best and not folder.checkpoint(records.best[0]).is_dir():
        what = f"the best evaluation by {by} so far is that after step {records.best[0]}, which has no checkpoint"
        session.console.warning(f"{what}: unless a later one is better, `final/` cannot be written")


def judge(run: Run, records: Records, step: int) -> tuple[bool, bool]:
    """Tell of an evaluation whether its checkpoint is kept as one of the best, and whether the run ends with it."""
    if run.session.config.evaluation.best_by is None:
        return False, False
    return run.session.agreed(step in records.best), is_over(run, records)


def is_over(run: Run, records: Records) -> bool:
    """Tell whether no more steps are taken, since the last evaluations were no better than one before; say so."""
    evaluation, done = run.session.config.evaluation, run.learner.done
    by, patience = evaluation.best_by, evaluation.patience
    if patience is None or not run.session.agreed(exhausted(records.evaluations, by, patience)):
        return False
    if done < run.plan.steps.num_steps:
        many = f"the last {patience} evaluations were" if patience > 1 else "the last evaluation was"
        run.session.console.notice(f"stopping after step {done}: {many} no better by {by}")
    return True


def conclude(run: Run, records: Records) -> Outcome:
    """Give the policy the weights that `final/` is to have; say which they are, and their figures.

    Raises:
        UserError: They are those of a checkpoint that is missing or damaged.
    """
    session, last = run.session, run.learner.done
    by = session.config.evaluation.best_by
    step = session.agreed(next(iter(records.best), last)) if by else last
    if step != last:
        _restore(run, step)
    # Rows of a run without held-out pairs that speak of some are not its own.
    rows = {row["step"]: row for row in records.evaluations} if run.holds_out else {}
    figures, of_last = rows.get(step), rows.get(last) if step != last else None
    if by and figures and run.before and not is_better(figures, run.before, by):
        what = f"no evaluation was better by {by} than before step 1 ({run.before[by]:.4f})"
        session.console.warning(f"{what}: `final/` is the best of those after it ({figures[by]:.4f}, step {step})")
    return Outcome(step, last, by, figures, of_last)


def _restore(run: Run, step: int) -> None:
    """Replace the policy's weights by those of a checkpoint; where each process has all of them, in the main one.

    Raises:
        UserError: It is missing or damaged.
    """
    session, path = run.session, run.plan.folder.checkpoint(step)
    is_main = session.accelerator.is_main_process
    if damage := session.agreed(_damage(path, run) if is_main else None):
        what = f"the checkpoint of the best step, {step}, cannot be used: {damage}"
        hint = f"restore it from elsewhere, and `--resume` finishes the run; or {_INSTEAD}"
        raise UserError(what, str(path), hint, status=FAILED)
    if is_main or run.learner.policy.sharded:
        run.learner.policy.weights.restore(path)


def _damage(path: Path, run: Run) -> str | None:
    """Say why a checkpoint cannot be used; None: it can."""
    try:
        check_whole(path, run.fingerprints)
    except DamagedFolder as damage:
        return str(damage)
    return None
