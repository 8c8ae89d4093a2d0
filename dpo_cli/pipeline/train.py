"""`dpo train`: the road from pairs to a trained model, one room after the other."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config import Config, resolved_yaml
from dpo_cli.data.sources import as_sources, describe
from dpo_cli.errors import FAILED, UserError, from_os_error, raise_all
from dpo_cli.interrupts import Interrupted, StopSignals
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.check import check, show_check
from dpo_cli.pipeline.passes import expected_layout, settle_passes, settle_tokens, without_gradient
from dpo_cli.pipeline.plan import header, make_plan, print_plan
from dpo_cli.reporting.console import Console, clock
from dpo_cli.training.run_folder import RESOLVED, RunFolder, RunState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from dpo_cli.data.schedule import Plan
    from dpo_cli.modeling.batch import Batches, PairBatch
    from dpo_cli.preference.reference import OpenReference
    from dpo_cli.reporting.trackers import MetricsLog
    from dpo_cli.training.checkpoints import TrainingParts
    from dpo_cli.training.loop import StepResult


@dataclass(frozen=True)
class _Run:
    """Everything that stands ready when the first step is taken."""

    config: Config
    folder: RunFolder
    console: Console
    signals: StopSignals
    accelerator: Accelerator
    data: setup.RunData
    plan: Plan
    batches: Batches
    scorer: Any
    reference: OpenReference
    parts: TrainingParts


def train(
    config: Config, console: Console, signals: StopSignals, *, resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Train a policy, or with `dry_run` check everything and print the plan.

    Args:
        config: What to do.
        console: What a person sees.
        signals: SIGINT and SIGTERM.
        resume: Go on from the newest whole checkpoint, or start where there is none.
        overwrite: Replace an older run in the folder.
        dry_run: Stop before anything is written to the run's folder.

    Raises:
        UserError: Something is wrong that the user can mend.
        Interrupted: A signal came; what was done is saved.
    """
    folder = RunFolder(Path(config.output_dir))
    unusable = folder.check(resume=resume, overwrite=overwrite) or (
        folder.check_inputs(setup.named_inputs(config)) if overwrite else None
    )
    raise_all([*setup.check_inputs(config), *([unusable] if unusable else [])])
    if resume:
        folder.check_unchanged(config.model_dump(mode="json"))
        if folder.state() is RunState.FINISHED:
            folder.check_final()
            console.notice(f"the run in {folder.path} is finished: {folder.final}")
            return
    console.notice("loading …")
    from dpo_cli.data.tokenize import end_tokens
    from dpo_cli.modeling.loading import empty_policy, load_policy
    from dpo_cli.modeling.memory import resident_bytes
    from dpo_cli.preference.reference import reference_model
    from dpo_cli.training.checks import check_columns, check_fits, check_tokens

    accelerator = setup.start_accelerator(config, project_dir=folder.trackers)
    with accelerator.main_process_first():
        tokenizer, tokenize = setup.load_tokenizer(config, config.model.name)
        data = setup.run_data(config, tokenize, console)
    plan, program_bytes = make_plan(config, data), resident_bytes()
    name, trust = config.model.name, config.model.trust
    policy = empty_policy(name, trust) if dry_run else load_policy(name, trust).to(accelerator.device)
    console.facts(header(config, folder, accelerator, data, plan, policy))
    check_fits(data.pairs, policy, "`model.name`")
    for proved in check_tokens(data.pairs, tokenizer, end_tokens(tokenizer, policy.generation_config)):
        console.notice(f"checked: {proved}")
    if ignored := check_columns(data.pairs, config.objective):
        console.warning(ignored)
    if dry_run:
        layout = expected_layout(config, policy, data.pairs, accelerator)
        batches, memory = settle_tokens(config, policy, data.pairs, layout, plan, accelerator, program_bytes, console)
        print_plan(config, data, plan, batches, memory, policy.num_parameters(), console)
        show_check(check(config, data, tokenizer), console)
        return
    models = list(dict.fromkeys([policy, reference_model(config.reference.model, policy, trust)]))
    resumed = folder.recorded("training.micro_batch_tokens") if resume else None
    config, batches = settle_passes(config, models, data, plan, accelerator, program_bytes, console, resumed)
    _check_logps(policy, plan, batches, accelerator, console)
    run = _build(config, folder, console, signals, accelerator, data, plan, batches, models, tokenizer)
    if config.reference.model is None and config.reference.type != "none":
        _check_reference(run)
    done = _start_folder(run, resume=resume, overwrite=overwrite)
    _walk(run, done)
    accelerator.end_training()


def _check_logps(
    policy: PreTrainedModel, plan: Plan, batches: Batches, accelerator: Accelerator, console: Console
) -> None:
    """Prove on the shortest pair, before hours go into a reference, that log-probabilities are the model's own."""
    from dpo_cli.modeling.scorer import Scorer
    from dpo_cli.training.checks import check_logps

    console.notice(f"checked: {check_logps(Scorer(policy), _shortest_pair(plan, batches), accelerator)}")


def _shortest_pair(plan: Plan, batches: Batches) -> PairBatch:
    """Return the shortest pair that is trained on: what holds of all pairs is proved on it in the least time."""
    from dpo_cli.data.schedule import MicroBatch

    trained_on = plan.trained_on()
    return batches(MicroBatch((int(trained_on[batches.pairs.sizes.longest[trained_on].argmin()]),)))


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
) -> _Run:
    """Open the reference before anything can change, then let Accelerate prepare the rest."""
    import numpy as np
    from torch.nn.parallel import DistributedDataParallel

    from dpo_cli.modeling.loading import weights_digest
    from dpo_cli.modeling.scorer import Scorer, recompute_activations
    from dpo_cli.preference.reference import ReferenceWork
    from dpo_cli.training.checkpoints import TrainingParts
    from dpo_cli.training.optimizer import optimizer as build_optimizer
    from dpo_cli.training.optimizer import schedule

    policy, other = models[0], models[-1]
    training = config.training
    stands_on = {"model": weights_digest(policy), "data": data.fingerprint}
    if other is not policy:
        stands_on["reference"] = weights_digest(other)
    needed = np.union1d(plan.trained_on(), data.held_out)
    with console.progress("reference log-probabilities", len(needed)) as progress:
        passes = without_gradient(batches)
        digest = stands_on.get("reference", stands_on["model"])
        work = ReferenceWork(other, policy, accelerator, needed, passes, progress, data.held_out, digest)
        reference = config.reference.open(work)
    # A cached reference needs its model no more.
    del other, work, models[1:]
    if training.gradient_checkpointing:
        recompute_activations(policy)
    optimizer = build_optimizer(training.optimizer, policy, training.learning_rate, training.weight_decay)
    rates = schedule(optimizer, training.schedule, training.warmup_ratio, plan.num_steps)
    scorer, optimizer = accelerator.prepare(Scorer(policy, collisions=config.objective.wpo), optimizer)
    if isinstance(scorer, DistributedDataParallel):
        # A model's buffers are constants; sending them around would tie ranks to the same number of passes.
        scorer.broadcast_buffers = False
    return _Run(
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
        parts=TrainingParts(policy, tokenizer, optimizer, rates, accelerator, reference.moving, {}, stands_on),
    )


def _check_reference(run: _Run) -> None:
    """Prove, before anything has moved, that training starts where the reference stands."""
    from dpo_cli.training.checks import check_reference

    shortest = _shortest_pair(run.plan, run.batches)
    proved = check_reference(run.scorer, run.config.objective, run.reference, shortest, run.accelerator)
    run.console.notice(f"checked: {proved}")


def _start_folder(run: _Run, *, resume: bool, overwrite: bool) -> int:
    """Make the run's folder ready and restore the newest checkpoint; return the steps that were taken."""
    from accelerate.utils import broadcast_object_list

    from dpo_cli.reporting.trackers import start_trackers
    from dpo_cli.training.checkpoints import load_checkpoint, newest_whole

    found: list[Path | None] = [None]
    if resume and run.accelerator.is_main_process:
        found = [newest_whole(run.folder.checkpoints)]
    checkpoint = broadcast_object_list(found)[0]
    # What stands there is kept until it is known that the run can go on from it.
    done = load_checkpoint(checkpoint, run.parts) if checkpoint else 0
    if run.accelerator.is_main_process:
        _describe(run, resume=resume, overwrite=overwrite)
    start_trackers(run.accelerator, run.config.tracking, run.config.model_dump(mode="json"), done)
    if checkpoint:
        run.console.notice(f"resuming after step {done}: {checkpoint}")
    elif resume:
        run.console.notice("no checkpoint yet: starting from step 1")
    return done


def _describe(run: _Run, *, resume: bool, overwrite: bool) -> None:
    """Clear the run's folder if that was asked for, and write down what runs and where.

    Raises:
        UserError: The disk refuses, or another run began in the folder meanwhile.
    """
    from dpo_cli.reporting.environment import environment
    from dpo_cli.storage import remove_strays, write_text

    described = json.dumps(environment(run.accelerator), indent=1, ensure_ascii=False)
    try:
        if meanwhile := run.folder.check(resume=resume, overwrite=overwrite):
            raise meanwhile
        if overwrite:
            run.folder.clear()
        run.folder.path.mkdir(parents=True, exist_ok=True)
        remove_strays(run.folder.path)
        write_text(run.folder.config, RESOLVED + resolved_yaml(run.config))
        write_text(run.folder.environment, described + "\n")
    except OSError as error:
        raise from_os_error(error, "preparing the output folder", str(run.folder.path)) from error


def _walk(run: _Run, done: int) -> None:
    """Take the steps, do after each what is due, and finish the run."""
    from dpo_cli.reporting.trackers import MetricsLog
    from dpo_cli.training.loop import NotFinite, train_steps

    accelerator = run.accelerator
    log = MetricsLog(run.folder.metrics, done) if accelerator.is_main_process else None
    results = train_steps(
        run.scorer,
        run.config.objective,
        run.reference,
        run.parts.optimizer,
        run.parts.schedule,
        run.plan.steps(run.batches.cut, done, accelerator.process_index, accelerator.num_processes),
        run.batches,
        accelerator,
        run.config.training.max_grad_norm,
        run.parts.memory,
        lambda: run.signals.received is not None,
    )
    started = before = time.monotonic()
    try:
        with run.signals.deferred(), run.console.steps(done, run.plan.num_steps) as show:
            for result in results:
                speed = result.num_tokens / (time.monotonic() - before)
                metrics = {"epoch": result.epoch, **result.metrics, "tokens_per_second": speed}
                _log(run, log, "train", result.number, metrics)
                show(result.number, metrics)
                _after_step(run, log, result)
                before = time.monotonic()
        if log:
            figures = log.last("eval")
            _save_final(run, figures)
            _summary(run, figures, time.monotonic() - started)
    except NotFinite as error:
        raise _explained(run, error) from None
    finally:
        if log:
            log.close()
    accelerator.wait_for_everyone()


def _after_step(run: _Run, log: MetricsLog | None, result: StepResult) -> None:
    """Evaluate and save when due, which depends on the step alone, and stop where any process was asked to."""
    from accelerate.utils import gather_object

    from dpo_cli.training.checkpoints import save_checkpoint

    config, step = run.config, result.number
    last = step == run.plan.num_steps
    stop = result.stop
    if len(run.data.held_out) and (last or _due(step, config.evaluation.every_steps)):
        _log(run, log, "eval", step, {"epoch": result.epoch, **_evaluate(run)})
        # An evaluation may be long; who was asked to stop meanwhile does not take another step.
        stop = any(gather_object([run.signals.received is not None])) or stop
    if not stop and not _due(step, config.checkpoints.every_steps):
        return
    if log:
        log.sync()
    path = save_checkpoint(run.folder.checkpoints, step, run.parts, config.checkpoints.keep)
    if stop:
        run.console.notice(f"stopped after step {step}; saved {path}")
        raise Interrupted(run.signals.received or signal.SIGTERM)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _log(run: _Run, log: MetricsLog | None, split: str, step: int, metrics: dict[str, Any]) -> None:
    """Write a row, and hand its numbers to the trackers."""
    if log:
        log.append({"split": split, "step": step, **metrics})
    if run.config.tracking:
        numbers = {f"{split}/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
        run.accelerator.log(numbers, step=step)


def _evaluate(run: _Run) -> dict[str, Any]:
    """Score the held-out pairs as they stand now."""
    from dpo_cli.evaluation.evaluate import evaluate

    held_out = run.data.held_out.tolist()
    with run.console.progress("evaluating", len(held_out)) as progress:
        results = evaluate(
            run.scorer,
            run.config.objective,
            run.reference.beginning or run.reference,
            held_out,
            without_gradient(run.batches),
            run.accelerator,
            progress,
        )
    return setup.finite_figures(results, run.data.pairs)


def _explained(run: _Run, error: Any) -> UserError:
    """Name the pairs of a step that was not taken, by file and line."""
    which = "its" if error.what == "loss" else "the step's"
    named = setup.named_pairs(run.data.pairs, error.pairs)
    what = f"the {error.what} of step {error.step} is not finite; {which} pairs: {named}"
    hint = "look at those pairs; lower `training.learning_rate`; the last checkpoint is as it was"
    return UserError(what, str(run.folder.checkpoints), hint, status=FAILED)


def _save_final(run: _Run, figures: dict[str, Any] | None) -> None:
    """Write the trained model as a complete Hugging Face folder, whole or not at all."""
    from dpo_cli.modeling.loading import saved_model
    from dpo_cli.reporting.card import model_card
    from dpo_cli.reporting.environment import versions

    facts = {
        "training pairs": len(run.data.train),
        "optimizer steps": run.plan.num_steps,
        "data": describe(as_sources(run.config.data.train)),
        "loss": str(run.config.objective),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    settings = run.config.model_dump(mode="json")
    card = model_card(run.folder.path.name, settings, facts, figures)
    with saved_model(run.folder.final, run.parts.policy, run.parts.tokenizer, "saving the trained model") as temporary:
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _summary(run: _Run, figures: dict[str, Any] | None, seconds: float) -> None:
    from dpo_cli.reporting.tables import figures_table

    run.console.notice(f"done in {clock(seconds)}")
    if figures:
        run.console.result(figures_table({"after": figures}))
    run.console.result(f"model    {run.folder.final}")
    run.console.result(f"metrics  {run.folder.metrics}")
