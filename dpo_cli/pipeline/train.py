"""`dpo train`: the road from pairs to a trained model, one room after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dpo_cli.config import Config, changeable, resolved_yaml
from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import from_os_error
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.loading import empty_policy, end_at, load_policy, weights_digest
from dpo_cli.modeling.memory import resident_bytes
from dpo_cli.modeling.routing import check_routers
from dpo_cli.modeling.saving import prove_saving
from dpo_cli.modeling.scorer import Scorer, recompute_activations
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.check import check, show_check
from dpo_cli.pipeline.extend import check_length
from dpo_cli.pipeline.forecast import disk_need, time_rows, warn_of_disk
from dpo_cli.pipeline.memory import check_memory
from dpo_cli.pipeline.passes import (
    expected_layout,
    prove_logps,
    settle_passes,
    settle_tokens,
    shortest_pair,
    without_gradient,
)
from dpo_cli.pipeline.plan import header, make_plan, out_of_reach, print_plan
from dpo_cli.pipeline.steps import Run, walk
from dpo_cli.preference.reference_work import ReferenceWork, reference_model, refuse_other_shapes
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.environment import environment
from dpo_cli.reporting.trackers import TrackedRun, start_trackers
from dpo_cli.system.signals import StopSignals
from dpo_cli.system.storage import discard, make_folder, remove_strays, write_text
from dpo_cli.training.checkpoints import newest_step, newest_whole
from dpo_cli.training.checks import check_columns, check_ends, check_fits, check_reference, check_tokens
from dpo_cli.training.loop import Skips, StepResult
from dpo_cli.training.optimizer import schedule
from dpo_cli.training.ranks import Progress, watched
from dpo_cli.training.run_folder import FIRST_DAY, RESOLVED, RunFolder, RunState, settings_digest
from dpo_cli.training.state import TrainingParts, load_checkpoint


def train(
    config: Config,
    console: Console,
    signals: StopSignals,
    *,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    extend: bool = False,
) -> Iterator[StepResult]:
    """Train a policy, yielding a result after each step, or with `dry_run` check everything and print the plan.

    Args:
        config: What to do.
        console: What a person sees.
        signals: Those that ask to stop.
        resume: Go on from the newest whole checkpoint, or start where there is none.
        overwrite: Replace an older run in the folder.
        dry_run: Stop before anything is written to the run's folder.
        extend: Resume with more steps also where the learning rate of steps that were taken would have been another.

    Raises:
        UserError: Something is wrong that the user can fix.
        Interrupted: A signal came; what was done is saved.
    """
    folder = RunFolder(Path(config.output_dir))
    accelerator = setup.start_accelerator(config)
    with watched(accelerator, config.training.rank_timeout, Console().error) as progress:
        how = {"resume": resume, "overwrite": overwrite, "dry_run": dry_run, "extend": extend}
        yield from _run(config, folder, console, signals, accelerator, progress, **how)
    accelerator.end_training()


def _run(
    config: Config,
    folder: RunFolder,
    console: Console,
    signals: StopSignals,
    accelerator: Accelerator,
    progress: Progress,
    *,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    extend: bool,
) -> Iterator[StepResult]:
    """Walk the road from the pairs to the trained model, alone or as one of several ranks."""
    name, trust, program_bytes = config.model.name, config.model.trust, resident_bytes()
    policy = empty_policy(name, trust)
    if config.objective.router_aux:
        check_routers(policy)
    if not (resume and folder.state() is RunState.FINISHED):
        check_memory(config, policy, accelerator, program_bytes)
    day = _first_day(folder, accelerator, resume=resume)
    with accelerator.main_process_first():
        tokenizer, tokenize = setup.load_tokenizer(config, config.model.name, day)
        setup.tell_day(tokenize, console)
        data = setup.run_data(config, tokenize, console)
    plan, program_bytes = make_plan(config, data), resident_bytes()
    if resume:
        if longer := check_length(config, folder, plan, extend=extend):
            console.notice(longer)
        elif folder.state() is RunState.FINISHED:
            console.notices(folder.nothing_left(extend=extend))
            return
    if not dry_run:
        policy = load_policy(name, trust).to(accelerator.device)
    if config.model.eos_token is not None:
        end_at(policy, tokenizer.eos_token_id)
    facts, disk = header(config, folder, accelerator, data, plan, policy), disk_need(config, folder, plan, policy)
    if not dry_run:
        console.facts(facts)
        warn_of_disk(disk, folder, console)
    for whose, lines in out_of_reach(config, data, plan).items():
        for line in lines:
            console.warning(line) if whose == "set" else console.notice(f"note: {line} (by default)")
    check_fits(data.pairs, policy, "`model.name`")
    ends = end_tokens(tokenizer, policy.generation_config)
    for proved in check_tokens(data.pairs, tokenizer, ends):
        console.notice(f"checked: {proved}")
    for warning in (check_ends(data.pairs, tokenizer, ends), check_columns(data.pairs, config.objective)):
        if warning:
            console.warning(warning)
    models = list(dict.fromkeys([policy, reference_model(config.reference.model, policy, trust, empty=dry_run)]))
    for reference in models[1:]:
        check_fits(data.pairs, reference, "`reference.model`")
    if dry_run:
        if config.reference.type == "synced":
            refuse_other_shapes(models[-1], policy)
        layout = expected_layout(config, policy, data.pairs, accelerator)
        batches, memory = settle_tokens(config, policy, data.pairs, layout, plan, accelerator, program_bytes, console)
        done = newest_step(folder.checkpoints) if resume else 0
        takes = time_rows(config, data, plan, batches, policy, models[-1], accelerator, done)
        print_plan(config, data, batches, memory, facts, {**takes, "disk": str(disk)}, console)
        warn_of_disk(disk, folder, console)
        show_check(check(config, data, tokenizer), console)
        return
    resumed = folder.recorded_count("training.micro_batch_tokens") if resume else None
    config, batches = settle_passes(config, models, data, plan, accelerator, program_bytes, console, resumed)
    for model, whose in zip(models, ("", "of the reference, "), strict=False):
        console.notice(f"checked: {whose}{prove_logps(model, batches, plan.trained_on(), accelerator)}")
    run = _build(config, folder, console, signals, accelerator, data, plan, batches, models, tokenizer)
    if config.reference.model is None and config.reference.type != "none":
        _check_reference(run)
    if accelerator.is_main_process:
        # transformers writes on the first rank alone.
        console.notice(f"checked: {prove_saving(policy, tokenizer)}")
    done, metrics = _start_folder(run, day, resume=resume, overwrite=overwrite)
    yield from walk(run, progress, done, metrics)


def _build(
    config: Config,
    folder: RunFolder,
    console: Console,
    signals: StopSignals,
    accelerator: Accelerator,
    data: setup.RunData,
    plan: Plan,
    batches: Batches,
    models: list[PreTrainedModel],
    tokenizer: Any,
) -> Run:
    """Open the reference before anything can change, then let Accelerate prepare the rest."""
    policy, other = models[0], models[-1]
    training = config.training
    settings = settings_digest(config.model_dump(mode="json"), changeable())
    stands_on = {"model": weights_digest(policy), "data": data.fingerprint, "settings": settings}
    if other is not policy:
        stands_on["reference"] = weights_digest(other)
    needed = np.union1d(plan.trained_on(), data.held_out)
    num_asked = config.reference.num_asked(len(needed), len(data.held_out))
    with console.progress("reference log-probabilities", num_asked) as progress:
        passes = without_gradient(batches)
        digest = stands_on.get("reference", stands_on["model"])
        work = ReferenceWork(other, policy, accelerator, needed, passes, progress, data.held_out, digest)
        reference = config.reference.open(work)
    # A cached reference needs its model no more.
    del other, work, models[1:]
    if training.gradient_checkpointing:
        recompute_activations(policy)
    optimizer = training.optimizer.over(policy, training.learning_rate, training.weight_decay)
    rates = schedule(optimizer, training.schedule, training.warmup_ratio, plan.num_steps)
    skips = Skips(training.max_skipped if training.on_nonfinite == "skip" else 0)
    scorer, optimizer = accelerator.prepare(Scorer(policy, collisions=config.objective.wpo), optimizer)
    if isinstance(scorer, DistributedDataParallel):
        # A model's buffers are constants; sending them around would tie ranks to the same number of passes.
        scorer.broadcast_buffers = False
    return Run(
        config=config,
        folder=folder,
        console=console,
        signals=signals,
        accelerator=accelerator,
        data=data,
        plan=plan,
        batches=batches,
        scorer=scorer,
        reference=reference,
        parts=TrainingParts(policy, tokenizer, optimizer, rates, accelerator, reference.moving, {}, skips, stands_on),
    )


def _check_reference(run: Run) -> None:
    """Prove, before anything has moved, that training starts where the reference stands."""
    shortest = shortest_pair(run.batches, run.plan.trained_on())
    proved = check_reference(run.scorer, run.config.objective, run.reference, shortest, run.accelerator)
    run.console.notice(f"checked: {proved}")


def _first_day(folder: RunFolder, accelerator: Accelerator, *, resume: bool) -> date:
    """Return the day on which the run began: a template that writes the date writes that one, also when it goes on."""
    found: list[date] = [(folder.first_day() if resume else None) or date.today()]
    return found[0] if accelerator.num_processes == 1 else broadcast_object_list(found)[0]


def _start_folder(run: Run, day: date, *, resume: bool, overwrite: bool) -> tuple[int, str]:
    """Make the run's folder ready and restore the newest checkpoint.

    Returns:
        The steps that were taken, and the digest of their metrics; empty where there are none.
    """
    found: list[Path | None] = [None]
    if resume and run.accelerator.is_main_process:
        found = [newest_whole(run.folder.checkpoints, run.parts.stands_on)]
    checkpoint = broadcast_object_list(found)[0]
    # What stands there is kept until it is known that the run can go on from it.
    done, metrics = load_checkpoint(checkpoint, run.parts) if checkpoint else (0, "")
    if run.accelerator.is_main_process:
        _describe(run, day, resume=resume, overwrite=overwrite)
    tracked = TrackedRun(run.folder.path.absolute().name, run.folder.trackers, done)
    start_trackers(run.accelerator, run.config.trackers, run.config.model_dump(mode="json"), tracked)
    if checkpoint:
        run.console.notice(f"resuming after step {done}: {checkpoint}")
    elif resume:
        run.console.notice("no checkpoint yet: starting from step 1")
    return done, metrics


def _describe(run: Run, day: date, *, resume: bool, overwrite: bool) -> None:
    """Clear the run's folder if that was asked for, and write down what runs and where.

    Raises:
        UserError: The disk refuses, or another run began in the folder meanwhile.
    """
    described = json.dumps({**environment(run.accelerator), FIRST_DAY: day.isoformat()}, indent=1)
    try:
        if meanwhile := run.folder.check(resume=resume, overwrite=overwrite):
            raise meanwhile
        if overwrite:
            run.folder.clear()
        elif run.folder.state() is RunState.FINISHED:
            # It is extended. Were it interrupted with its old model in place, it would count as finished.
            discard(run.folder.final)
        make_folder(run.folder.path)
        remove_strays(run.folder.path)
        remove_strays(run.folder.checkpoints)
        write_text(run.folder.config, RESOLVED + resolved_yaml(run.config))
        write_text(run.folder.environment, described + "\n")
    except OSError as error:
        raise from_os_error(error, "preparing the output folder", str(run.folder.path)) from error
