"""`dpo train`: the road from pairs to a trained model, from top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.config import Config, changeable
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.adapters.files import adapter_folder
from dpo_cli.modeling.allocator import hand_back_freed_memory
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.saving import warn_of_ignored
from dpo_cli.modeling.memory import MemoryEstimate, used_bytes
from dpo_cli.modeling.placement import Sharded
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.alike import check_job, named_models
from dpo_cli.pipeline.best import check_evaluations, conclude, is_over, judge
from dpo_cli.pipeline.compilation import compile_layers_of
from dpo_cli.pipeline.forecast import disk_need, show_forecast, warn_of_disk
from dpo_cli.pipeline.memory import without_gradient
from dpo_cli.pipeline.models import end_as_trained, open_reference, opened, shortest_pair, trained_policy
from dpo_cli.pipeline.out_of_memory import during, reported
from dpo_cli.pipeline.plan import PlannedRun, check_data, header, noted, planned
from dpo_cli.pipeline.report import report_if_broken_off
from dpo_cli.pipeline.resume import begin
from dpo_cli.pipeline.run import Records, Run, recorded, save_final, summarize
from dpo_cli.pipeline.samples import answer_samples, sampling_of
from dpo_cli.pipeline.session import Session, started
from dpo_cli.pipeline.settling import measured, recuts_of, settled_on_paper, settling
from dpo_cli.reporting.console import Console, Record
from dpo_cli.system.signals import Interrupted, StopSignals
from dpo_cli.system.text import several
from dpo_cli.training.checkpoints import PRECISION, check_finite
from dpo_cli.training.checks import check_base, check_reference
from dpo_cli.training.learner import Learner, NotFinite, Skips, StepResult
from dpo_cli.training.optimizer import schedule
from dpo_cli.training.recorded_settings import settings_digest
from dpo_cli.training.run_folder import METRICS, RunFolder
from dpo_cli.training.together import check_shared


def train(
    config: Config,
    console: Console,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    extend: bool,
    dry_run: bool,
) -> Iterator[StepResult]:
    """Train a policy, yielding a result after each step; or, with `dry_run`, print what it would take.

    Args:
        config: What to do.
        console: What a person sees.
        signals: Those that ask to stop.
        resume: Go on from the newest whole checkpoint, or start where there is none.
        overwrite: Replace an older run in the folder.
        extend: Resume with more steps also where the learning rate of steps that were taken would have been another.
        dry_run: Stop before anything is written to the run's folder.

    Raises:
        UserError: Something is wrong that the user can fix.
        Interrupted: A signal came; what was done is saved.
    """
    with started(config, console, signals, trains=True) as session:
        asked = {"--resume": resume, "--overwrite": overwrite, "--extend": extend, "--dry-run": dry_run}
        check_job(session, asked, named_models(config))
        folder = RunFolder(Path(config.output_dir))
        _check_disk(session, folder, resume=resume, dry_run=dry_run)
        plan = planned(session, folder, resume=resume, extend=extend)
        if plan and dry_run:
            show_forecast(plan, resume=resume)
        elif plan:
            _announce(plan)
            settled = settled_on_paper(plan, resume=resume)
            with reported(config, settled[1]):
                run = _ready(plan, settled, resume=resume)
                how = {"resume": resume, "overwrite": overwrite}
                restored = begin(run.session, plan.folder, run.learner, run.fingerprints, noted(plan), **how)
                run.before.update(restored.before if restored else {})
                yield from _take(run, {METRICS: restored.metrics, **restored.rows} if restored else {})


def _check_disk(session: Session, folder: RunFolder, *, resume: bool, dry_run: bool) -> None:
    """Find out whether those processes share the run's folder that write or read it.

    Raises:
        UserError: Some do not.
    """
    num_ranks = session.accelerator.num_processes
    if dry_run or num_ranks == 1:
        return
    if resume:
        check_shared(folder.path, num_ranks, "resuming needs", "start anew without `--resume`")
    elif isinstance(session.placement, Sharded):
        # The first that split weights among themselves write all of them; all read the best checkpoint in the end.
        sharing = session.placement.mesh.shape[-1] if session.config.evaluation.best_by is None else num_ranks
        check_shared(folder.path, sharing, "checkpoints in shards need", "`training.sharding: none`")


def _announce(plan: PlannedRun) -> None:
    """Say what is going to run, and prove of its pairs what can be proved without the model.

    Raises:
        UserError: Something does not hold.
    """
    session, config = plan.session, plan.session.config
    session.console.facts(header(plan))
    warn_of_disk(disk_need(config, plan.folder, plan.steps, plan.sketch), plan.folder, session.console)
    check_data(plan)


def _ready(plan: PlannedRun, settled: tuple[Batches, MemoryEstimate], *, resume: bool) -> Run:
    """Load the models, prove that they do what they should, and open the reference before anything can change."""
    session, config, data = plan.session, plan.session.config, plan.data
    other = {"`reference.model`": config.reference.model} if config.reference.model else {}
    named: dict[str, str | Policy] = {"`model.name`": trained_policy(session), **other}
    all_pairs = np.concatenate([data.train, data.held_out])
    settle = settling(plan, settled, resume=resume)
    models, batches = opened(session, named, data.pairs, all_pairs, settle, trained=True)
    policy, training, accelerator = models[0], config.training, session.accelerator
    # An adapter's base is known by its settings as they came; those of a whole model change what it is.
    began = policy.weights.fingerprints if config.adapter else {}
    if config.adapter and config.adapter.start:
        for line in check_base(policy, adapter_folder(config.adapter.start), config.model.name):
            session.console.notice(line)
    end_as_trained(policy, config, plan.tokenizer, data)
    fingerprints = {
        # Beside an adapter the base is held as it is computed, and another precision makes another base of it.
        **({PRECISION: session.precision.name} if config.adapter else {}),
        **(began or policy.weights.fingerprints),
        "data": data.fingerprint,
        "settings": settings_digest(config.model_dump(mode="json"), changeable()),
        **({"reference": models[-1].identity} if config.reference.model else {}),
    }
    policy.place(accelerator, trained=True, collisions=config.objective.wpo, recomputed=training.gradient_checkpointing)
    batches = measured(plan, policy, batches, resume=resume)
    session = session.under(_with_tokens(config, batches.micro_batch_tokens))
    with during("while decoder layers were compiled"):
        compile_layers_of(session, policy, batches, plan.steps)
    needed = np.union1d(plan.steps.trained_on(), data.held_out)
    # A cached reference needs its model no more.
    reference = open_reference(
        session, models.pop(), without_gradient(batches), needed, policy=policy, held_out=data.held_out
    )
    optimizer = training.optimizer.over(
        policy.weights.trained(), training.learning_rate, training.weight_decay, on_host=training.offload is not None
    )
    # Before the optimizer is prepared: a gradient scaler keeps the step that the schedule counts.
    rates = schedule(optimizer, training.schedule, training.warmup_ratio, plan.steps.num_steps)
    learner = Learner(
        policy=policy,
        objective=config.objective,
        reference=reference,
        optimizer=accelerator.prepare_optimizer(optimizer),
        rates=rates,
        accelerator=accelerator,
        max_grad_norm=training.max_grad_norm,
        skips=Skips(training.max_skipped if training.on_nonfinite == "skip" else 0),
        recuts=recuts_of(plan, resume=resume),
        asked_to_stop=lambda: session.signals.received is not None,
    )
    run = Run(session, plan, batches, learner, fingerprints, sampling_of(plan, policy, batches))
    with session.during("while what the reference answers was proved"):
        _prove(run)
    if config.adapter is not None and accelerator.device.type == "cpu":
        # Of a run of all weights, gradients and moments take its place.
        hand_back_freed_memory()
    return run


def _with_tokens(config: Config, num_tokens: int) -> Config:
    """Return a configuration in which the tokens of a forward pass are settled."""
    training = config.training.model_copy(update={"micro_batch_tokens": num_tokens})
    return config.model_copy(update={"training": training})


def _prove(run: Run) -> None:
    """Prove, before anything has moved, that training starts from the reference, and that the model can be saved."""
    session, reference = run.session, run.session.config.reference
    if reference.model is None and reference.type != "none":
        shortest = shortest_pair(run.batches, run.plan.steps.trained_on())
        objective = session.config.objective
        proved = check_reference(run.learner.policy, objective, run.learner.reference, shortest, session.accelerator)
        session.console.notice(f"checked: {proved}")
    if session.accelerator.is_main_process:
        # transformers writes on the first rank alone.
        warn_of_ignored(run.learner.policy.model)
        session.console.notice(f"checked: {run.learner.policy.weights.prove_saving(run.plan.tokenizer)}")


def _take(run: Run, digests: Mapping[str, str]) -> Iterator[StepResult]:
    """Take the steps, do after each what is due, and finish the run.

    Args:
        run: All that it takes.
        digests: Those of the rows of the steps before, by the file that they are in; none at step 0.
    """
    session, done = run.session, run.learner.done
    is_main = session.accelerator.is_main_process
    with report_if_broken_off(run.plan.folder, writes=is_main), recorded(run) as records:
        damaged = records.damaged(digests)
        only_evaluates = done == run.plan.steps.num_steps and run.holds_out
        for name in damaged:
            what = f"rows of {run.plan.folder.row_files[name]} are missing or changed that were there at step {done}"
            session.console.warning(what + "; measuring the held-out figures again" * only_evaluates)
        check_evaluations(run, records, damaged=METRICS in damaged)
        started_at = time.monotonic()
        if not done and run.holds_out:
            run.before.update(records.evaluated(0, 0.0, run.measure_before()))
            answer_samples(run, records, 0)
        records.diagnose()
        with session.signals.deferred():
            if not is_over(run, records):
                yield from _steps(run, records)
            saving = session.progress.during("while the trained model was saved")
            with session.signals.during("the trained model is saved"), saving:
                if only_evaluates and any(session.of_all(bool(damaged))):
                    _measure_again(run, records)
                records.finish()
                outcome = conclude(run, records)
                save_final(run, outcome)
        if records.diagnosis:
            summarize(run, outcome, records.diagnosis, time.monotonic() - started_at)
    session.accelerator.wait_for_everyone()


def _steps(run: Run, records: Records) -> Iterator[StepResult]:
    """Take one step after the other, and do what is due after it.

    Raises:
        UserError: A loss, a gradient or the weights are not finite; or the disk refuses.
        Interrupted: A signal came; what was done is saved.
    """
    session, every = run.session, run.session.config.logging.every_steps
    begun = before = time.monotonic()
    taken, device = run.learner.done, session.accelerator.device

    def unsaved() -> int:
        return taken - records.writer.newest

    session.signals.unsaved = unsaved
    try:
        shown = session.console.steps(taken, run.plan.steps.num_steps, None if every == "auto" else every)
        taking = contextlib.closing(run.learner.steps(run.plan.steps, run.batches))
        with shown as record, taking as steps:
            following = session.progress.following(steps, taken)
            for result in _noted(following, run.learner):
                taken = result.number
                if result.broken:
                    run.tell_skipped(result.broken)
                now = time.monotonic()
                metrics: dict[str, Any] = {
                    "epoch": result.epoch,
                    **result.metrics,
                    "tokens_per_second": result.num_tokens / (now - before),
                    "seconds": now - begun,
                    "memory_bytes": used_bytes(device),
                }
                if result.broken:
                    metrics["skipped"] = run.learner.skips.count
                records.add("train", result.number, metrics)
                record.step(result.number, metrics)
                ends = _after_step(run, records, result, record)
                yield result
                if ends:
                    break
                before = time.monotonic()
    except NotFinite as broken:
        hint = "look at those pairs; lower `training.learning_rate`; the last checkpoint is intact"
        skipped = min(run.learner.skips.count, run.learner.skips.allowed)
        already = f"; {several(skipped, 'step was', 'steps were')} skipped before" if skipped else ""
        what = run.described(broken) + already
        raise UserError(what, str(run.plan.folder.checkpoints), hint, status=FAILED) from None


def _noted(results: Iterator[StepResult], learner: Learner) -> Iterator[StepResult]:
    """Yield results of steps; note on an error that says that memory has run out in which step it did."""
    while True:
        with during(f"in step {learner.done + 1}"):
            result = next(results, None)
        if result is None:
            return
        yield result


def _after_step(run: Run, records: Records, result: StepResult, record: Record) -> bool:
    """Evaluate and save when due, which depends on step and evaluations, and stop where any process was asked to.

    Returns:
        Whether the run ends here.
    """
    session, config, step = run.session, run.session.config, result.number
    ends, stop, save = step == run.plan.steps.num_steps, result.stop, _due(step, config.checkpoints.every_steps)
    evaluates = run.holds_out and (ends or _due(step, config.evaluation.every_steps))
    if ends or stop or save or evaluates:
        check_finite(step, result.pairs, run.learner.policy)
    if evaluates:
        with session.signals.during("this evaluation"):
            figures = records.evaluated(step, result.epoch, run.measure())
            answer_samples(run, records, step)
        record.evaluated(step, figures)
        is_best, is_last = judge(run, records, step)
        save, ends = save or is_best, ends or is_last
        # An evaluation may be long; who was asked to stop meanwhile does not take another step.
        stop = any(session.of_all(session.signals.received is not None)) or stop
    # Before a checkpoint is saved: what rows showed up to there is not said again after it.
    records.diagnose()
    if not (stop or save or (ends and config.checkpoints.at_end)):
        return ends
    with session.progress.during("while a checkpoint was saved"):
        path = records.save()
    if not stop:
        record.saved(step, path, background=config.checkpoints.background)
        return ends
    with session.progress.during("while a checkpoint was saved"):
        records.writer.finish()
    session.console.answer(f"stopped after step {step}; saved {path}; `--resume` continues from there")
    raise Interrupted(next(filter(None, session.of_all(session.signals.received))))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _measure_again(run: Run, records: Records) -> None:
    """Measure the last step's figures anew, where its row is damaged and no step is left to take.

    Otherwise the trained model's card would have those of another step, or what somebody made up.
    """
    step, results = run.plan.steps.num_steps, run.measure()
    records.forget(step)
    records.evaluated(step, run.plan.steps.epochs_after(step), results)
    answer_samples(run, records, step)
