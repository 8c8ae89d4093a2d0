"""The steps of a run, one after the other, and what is due after each: a row, an evaluation, a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from dpo_cli.config import Config
from dpo_cli.data.pairs.sources import as_sources, describe
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.diagnosis import worsened
from dpo_cli.evaluation.evaluate import evaluate
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.saving import check_saved, saved_model
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.passes import without_gradient
from dpo_cli.preference.reference import OpenReference
from dpo_cli.reporting.card import model_card
from dpo_cli.reporting.console import Console, Record
from dpo_cli.reporting.environment import versions
from dpo_cli.reporting.metrics_log import MetricsLog
from dpo_cli.reporting.progress import clock
from dpo_cli.reporting.tables import figures_table
from dpo_cli.system.signals import Interrupted, StopSignals
from dpo_cli.training.checkpoints import CheckpointWriter, check_finite
from dpo_cli.training.loop import NotFinite, StepResult, train_steps
from dpo_cli.training.ranks import Progress
from dpo_cli.training.run_folder import RunFolder
from dpo_cli.training.state import TrainingParts


@dataclass(frozen=True)
class Run:
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


def walk(run: Run, progress: Progress, done: int, metrics: str) -> Iterator[StepResult]:
    """Take the steps, do after each what is due, and finish the run.

    Args:
        run: All that it takes.
        progress: Is told how far the run is, for other ranks to see.
        done: Steps that were taken before.
        metrics: The digest that the rows of those steps have in metrics.jsonl, or nothing.
    """
    accelerator, saving = run.accelerator, run.config.checkpoints
    first = {"split": "eval", "step": 0, "epoch": 0.0, **run.parts.before} if run.parts.before else None
    log = MetricsLog(run.folder.metrics, done, first) if accelerator.is_main_process else None
    spoilt = log is not None and metrics not in ("", log.digest)
    again = done == run.plan.num_steps and len(run.data.held_out) > 0
    if spoilt:
        what = f"rows of {run.folder.metrics} are missing or changed that were there at step {done}"
        run.console.warning(what + "; measuring the held-out figures again" * again)
    writer = CheckpointWriter(run.folder.checkpoints, saving.keep, background=saving.background, newest=done)
    started = time.monotonic()
    try:
        if not done and len(run.data.held_out):
            _measure_before(run, log)
        with run.signals.deferred():
            yield from _take_steps(run, progress, done, log, writer)
            with run.signals.during("the trained model is saved"):
                if again:
                    _evaluate_again(run, log, spoilt=spoilt)
                writer.finish()
                # Rows of a run without held-out pairs that speak of some are not its own.
                figures = log.last("eval") if log and len(run.data.held_out) else None
                if log:
                    _save_final(run, figures)
        if log:
            _summary(run, figures, time.monotonic() - started)
    except (Exception, GeneratorExit):
        # The last checkpoint may still be on its way to the disk.
        with contextlib.suppress(Exception):
            writer.finish()
        raise
    finally:
        if log:
            log.close()
    accelerator.wait_for_everyone()


def _take_steps(
    run: Run, progress: Progress, done: int, log: MetricsLog | None, writer: CheckpointWriter
) -> Iterator[StepResult]:
    """Take one step after the other, and do what is due after it.

    Raises:
        UserError: A loss, a gradient or the weights are not finite; or the disk refuses.
        Interrupted: A signal came; what was done is saved.
    """
    accelerator = run.accelerator
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
        lambda broken: _may_skip(run, broken),
    )
    before, taken = time.monotonic(), done

    def unsaved() -> int:
        return taken - writer.newest

    run.signals.unsaved = unsaved
    every = run.config.logging.every_steps
    try:
        with run.console.steps(done, run.plan.num_steps, None if every == "auto" else every) as record:
            for result in progress.following(results, done, run.scorer):
                taken = result.number
                speed = result.num_tokens / (time.monotonic() - before)
                metrics: dict[str, Any] = {"epoch": result.epoch, **result.metrics, "tokens_per_second": speed}
                if not result.taken:
                    metrics["skipped"] = run.parts.skips.count
                _log(run, log, "train", result.number, metrics)
                record.step(result.number, metrics)
                _after_step(run, log, writer, result, record)
                yield result
                before = time.monotonic()
    except NotFinite as broken:
        hint = "look at those pairs; lower `training.learning_rate`; the last checkpoint is as it was"
        skipped = min(run.parts.skips.count, run.parts.skips.allowed)
        what = _described(run, broken) + (f"; {skipped} steps were skipped before" if skipped else "")
        raise UserError(what, str(run.folder.checkpoints), hint, status=FAILED) from None


def _after_step(run: Run, log: MetricsLog | None, writer: CheckpointWriter, result: StepResult, record: Record) -> None:
    """Evaluate and save when due, which depends on the step alone, and stop where any process was asked to."""
    config, step = run.config, result.number
    last = step == run.plan.num_steps
    stop = result.stop
    save = _due(step, config.checkpoints.every_steps) or (last and config.checkpoints.at_end)
    evaluates = len(run.data.held_out) > 0 and (last or _due(step, config.evaluation.every_steps))
    if last or stop or save or evaluates:
        check_finite(step, result.pairs, run.parts.policy)
    if evaluates:
        with run.signals.during("this evaluation"):
            figures = _evaluate(run, run.scorer)
        _log(run, log, "eval", step, {"epoch": result.epoch, **figures})
        record.evaluated(step, figures)
        # An evaluation may be long; who was asked to stop meanwhile does not take another step.
        stop = any(gather_object([run.signals.received is not None])) or stop
    if not stop and not save:
        return
    if log:
        log.sync()
    path = writer.save(step, run.parts, log.digest if log else "")
    if not stop:
        record.saved(step, path, background=config.checkpoints.background)
    else:
        writer.finish()
        run.console.answer(f"stopped after step {step}; saved {path}; `--resume` goes on from there")
        asked = [number for number in gather_object([run.signals.received]) if number]
        raise Interrupted(asked[0])


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _log(run: Run, log: MetricsLog | None, split: str, step: int, metrics: dict[str, Any]) -> None:
    """Write a row, and hand its numbers to the trackers."""
    if log:
        log.append({"split": split, "step": step, **metrics})
    if run.config.trackers:
        numbers = {f"{split}/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
        run.accelerator.log(numbers, step=step)


def _measure_before(run: Run, log: MetricsLog | None) -> None:
    """Score the held-out pairs before step 1, and let every checkpoint keep the figures.

    A reference that is the policy before step 1 answers for it: where its answers are cached, no model is asked.
    """
    config = run.config
    is_policy = config.reference.type != "none" and config.reference.model is None
    # Weights by the policy's own probabilities take more than the probabilities of the responses.
    scorer = _reference(run) if is_policy and not config.objective.wpo else run.scorer
    run.parts.before.update(_evaluate(run, scorer, "evaluating before step 1"))
    _log(run, log, "eval", 0, {"epoch": 0.0, **run.parts.before})


def _reference(run: Run) -> OpenReference | BatchScorer:
    """Return what held-out pairs are compared with: the reference, or what it was before it moved."""
    return run.reference.beginning or run.reference


def _evaluate(run: Run, scorer: BatchScorer, what: str = "evaluating") -> dict[str, Any]:
    """Score the held-out pairs with what answers for the policy."""
    held_out = run.data.held_out.tolist()
    with run.console.progress(what, len(held_out)) as progress:
        results = evaluate(
            scorer,
            run.config.objective,
            _reference(run),
            held_out,
            without_gradient(run.batches),
            run.accelerator,
            progress,
        )
    return setup.finite_figures(results, run.data.pairs, str(run.folder.checkpoints))


def _evaluate_again(run: Run, log: MetricsLog | None, *, spoilt: bool) -> None:
    """Where the main process's rows are spoilt and no step is left to take, measure the last step's figures anew.

    Otherwise the trained model's card would have those of another step, or what somebody made up.
    """
    step = run.plan.num_steps
    if any(gather_object([spoilt])):
        figures = {"epoch": run.plan.epochs_after(step), **_evaluate(run, run.scorer)}
        if log:
            log.forget("eval", step)
        _log(run, log, "eval", step, figures)


def _may_skip(run: Run, broken: NotFinite) -> bool:
    """Tell whether a step that would spoil the weights may be left out once more, and if so, that it is."""
    skips = run.parts.skips
    if not skips.take():
        return False
    run.console.warning(
        f"skipping step {broken.step} ({skips.count} of at most {skips.allowed}): {_described(run, broken)}"
    )
    return True


def _described(run: Run, broken: NotFinite) -> str:
    """Say what is not finite, and name the pairs by file and line."""
    which = "its" if broken.what == "loss" else "the step's"
    return f"{broken}; {which} pairs: {setup.named_pairs(run.data.pairs, broken.pairs)}"


def _save_final(run: Run, figures: dict[str, Any] | None) -> None:
    """Write the trained model as a complete Hugging Face folder, whole or not at all."""
    facts = {
        "training pairs": len(run.data.train),
        "optimizer steps": run.plan.num_steps,
        "data": describe(as_sources(run.config.data.train)),
        "loss": str(run.config.objective),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    settings = run.config.model_dump(mode="json")
    card = model_card(run.folder.path.name, settings, facts, _before_and_after(run, figures))
    with saved_model(run.folder.final, run.parts.policy, run.parts.tokenizer, "saving the trained model") as temporary:
        (temporary / "README.md").write_text(card, encoding="utf-8")
        check_saved(temporary, run.parts.policy)


def _worsened(run: Run, figures: dict[str, Any]) -> str:
    """Say in one line what is worse than before step 1, and which settings to change; nothing where all is well."""
    objective, training = run.config.objective, run.config.training
    chosen_tokens = float(run.data.pairs.sizes.chosen_judged[run.data.held_out].mean())
    advice = [f"lower `training.learning_rate` ({training.learning_rate:g})"]
    advice += [f"train fewer steps ({run.plan.num_steps})"]
    advice += ["raise `beta` of the loss"] if objective.needs_reference else []
    advice += ["add the loss `sft`"] if all(loss.type != "sft" for loss in objective.losses) else []
    found = "; ".join(worsened(run.parts.before, figures, chosen_tokens))
    return found and f"the model is worse than before step 1: {found}. Try one of these: {', '.join(advice)}"


def _before_and_after(run: Run, figures: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the columns of the closing table: the held-out figures before step 1, where they are known, and now."""
    columns = {"before": run.parts.before, "after": figures}
    return {name: column for name, column in columns.items() if column} if figures else {}


def _summary(run: Run, figures: dict[str, Any] | None, seconds: float) -> None:

    run.console.block()
    run.console.notice(f"done in {clock(seconds)}")
    if figures:
        run.console.result(figures_table(_before_and_after(run, figures)))
        if run.parts.before and (worse := _worsened(run, figures)):
            run.console.warning(worse)
    run.console.result(f"model    {run.folder.final}")
    run.console.result(f"metrics  {run.folder.metrics}")
