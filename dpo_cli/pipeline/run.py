"""A run under way: what it has, the rows and held-out figures that it keeps, and what it ends with."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.evaluation.best import Outcome, best_steps
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.figures import figures
from dpo_cli.evaluation.held_out import held_out_rows
from dpo_cli.evaluation.samples import Sampling
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.saving import origin_of, saved_folder
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.pipeline.diagnosis import Diagnosis
from dpo_cli.pipeline.evaluate import scored
from dpo_cli.pipeline.memory import without_gradient
from dpo_cli.pipeline.model_cards import card_of_run, changes_of, digest_of_base
from dpo_cli.pipeline.pairs import named_pairs
from dpo_cli.pipeline.plan import PlannedRun
from dpo_cli.pipeline.report import report_at_end
from dpo_cli.pipeline.session import Session
from dpo_cli.reporting.card import ADAPTER, MODEL, model_card
from dpo_cli.reporting.progress import clock
from dpo_cli.reporting.row_log import RowLog
from dpo_cli.reporting.run_record import answers_in
from dpo_cli.reporting.samples import before_and_after
from dpo_cli.reporting.tables import figures_table
from dpo_cli.reporting.trackers import show_samples
from dpo_cli.system.hub import CARD
from dpo_cli.training.checkpoints import FINGERPRINTS, HELD, CheckpointWriter, prune
from dpo_cli.training.learner import Learner, NotFinite
from dpo_cli.training.run_folder import HELD_OUT, METRICS, SAMPLES, RunFolder
from dpo_cli.training.state import RunNotes
from dpo_cli.training.together import Together


@dataclass(frozen=True)
class Run:
    """Everything that is ready when the first step is taken.

    Attributes:
        session: Says what to do, micro-batches settled.
        plan: Its folder, pairs and steps.
        batches: How pairs go through the model.
        learner: What changes from step to step.
        fingerprints: Digests of what a resumed run needs to find unchanged: the model before step 1, data, settings.
        sampling: The held-out prompts that are answered; None: there are none.
        before: The held-out figures before step 1; filled in place, empty where nothing is held out.
    """

    session: Session
    plan: PlannedRun
    batches: Batches
    learner: Learner
    fingerprints: dict[str, str]
    sampling: Sampling | None = None
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return len(self.plan.data.held_out) > 0

    @property
    def writes(self) -> frozenset[str]:
        """The files to which it adds rows; of others it has those of an earlier start alone."""
        return frozenset({METRICS, *([HELD_OUT] if self.holds_out else []), *([SAMPLES] if self.sampling else [])})

    def measure(self, scorer: BatchScorer | None = None, what: str = "evaluating") -> list[PairResult]:
        """Score the held-out pairs with the policy, or with what answers for it; return what is found of each.

        Raises:
            UserError: A pair's loss is not finite.
        """
        # They are compared with the reference, or with what it was before it moved.
        reference = self.learner.reference.beginning or self.learner.reference
        where, batches = str(self.plan.folder.checkpoints), without_gradient(self.batches)
        return scored(
            self.session,
            scorer or self.learner.policy.scorer,
            reference,
            batches,
            self.plan.data.held_out,
            where,
            what,
        )

    def measure_before(self) -> list[PairResult]:
        """Score the held-out pairs before step 1.

        A reference that is the policy before step 1 answers for it: where its answers are cached, no model is asked.
        """
        config = self.session.config
        is_policy = config.reference.type != "none" and config.reference.model is None
        # Weights by the policy's own probabilities take more than the probabilities of the responses.
        scorer = (
            (self.learner.reference.beginning or self.learner.reference)
            if is_policy and not config.objective.wpo
            else None
        )
        return self.measure(scorer, "evaluating before step 1")

    def tell_skipped(self, broken: NotFinite) -> None:
        """Say that a step was left out, since loss or gradient was not finite."""
        skips = self.learner.skips
        shown = f"skipping step {broken.step} ({skips.count} of at most {skips.allowed})"
        self.session.console.warning(f"{shown}: {self.described(broken)}")

    def described(self, broken: NotFinite) -> str:
        """Say what is not finite, and name the pairs by file and line."""
        which = "its" if broken.what == "loss" else "the step's"
        return f"{broken}; {which} pairs: {named_pairs(self.batches.pairs, broken.pairs)}"


@dataclass(frozen=True)
class Records:
    """What a run saves while it trains.

    Attributes:
        run: The run.
        logs: The files of rows by their names, in the main process; none in others.
        writer: Writes checkpoints.
        diagnosis: Warns of what the rows show, in the main process; None in others.
    """

    run: Run
    logs: Mapping[str, RowLog]
    writer: CheckpointWriter
    diagnosis: Diagnosis | None = None

    @property
    def log(self) -> RowLog | None:
        """The rows of metrics.jsonl, in the main process; None in others."""
        return self.logs.get(METRICS)

    def damaged(self, digests: Mapping[str, str]) -> list[str]:
        """Return the files of rows that have other rows than a checkpoint says, in the main process."""
        return [name for name, log in self.logs.items() if digests.get(name, "") not in ("", log.digest)]

    def add(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        """Write a row, and hand its numbers to the trackers."""
        if self.log:
            self.log.append({"split": split, "step": step, **metrics})
        if self.run.session.config.trackers:
            numbers = {f"{split}/{k}": v for k, v in metrics.items() if isinstance(v, (int, float))}
            self.run.session.accelerator.log(numbers, step=step)

    def evaluated(self, step: int, epoch: float, results: Sequence[PairResult]) -> dict[str, Any]:
        """Write what an evaluation says of each held-out pair, then the row of its figures; return these.

        Args:
            step: The step after which it was made.
            epoch: The epochs up to there.
            results: What it says.
        """
        found, plan = figures(results), self.run.plan
        if HELD_OUT in self.logs:
            decode = functools.partial(plan.tokenizer.decode, skip_special_tokens=True)
            self.logs[HELD_OUT].append(*held_out_rows(step, results, plan.data.pairs, decode))
        self.add("eval", step, {"epoch": epoch, **found})
        return found

    def answered(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers after a step, and hand them to the trackers."""
        if SAMPLES in self.logs:
            self.logs[SAMPLES].append(*rows)
        session = self.run.session
        for refused in show_samples(session.accelerator, session.config.trackers, rows):
            session.console.warning(f"{refused}; `{self.run.plan.folder.samples}` has them")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of all evaluations; none in other processes than the main one."""
        return self.log.evaluations if self.log else []

    @property
    def best(self) -> list[int]:
        """The steps of the best evaluations, whose checkpoints are kept: the main process knows them, if any."""
        config = self.run.session.config
        by, keep = config.evaluation.best_by, max(config.checkpoints.keep_best, 1)
        return best_steps(self.evaluations, by)[:keep] if by else []

    def diagnose(self) -> None:
        """Warn of what the rows show that are there now: to be called when a step has all of its own."""
        if self.diagnosis:
            self.diagnosis.warn()

    def save(self) -> Path:
        """Write a checkpoint after the last step, its rows first; return its folder."""
        digests = {}
        for name, log in self.logs.items():
            log.sync()
            digests[name] = log.digest
        metrics = digests.pop(METRICS, "")
        notes = RunNotes(self.run.fingerprints, metrics, self.run.before, digests)
        return self.writer.save(self.run.learner, notes, self.best)

    def forget(self, step: int) -> None:
        """Remove what was measured at a step, which is measured again."""
        for name, log in self.logs.items():
            log.forget(step, "eval" if name == METRICS else None)

    def finish(self) -> None:
        """Wait until what was saved is on the disk, without what an interrupted run had no time to remove.

        Raises:
            UserError: The disk refused it.
        """
        self.writer.finish()
        if self.log:
            prune(self.writer.folder, self.writer.keep, self.writer.newest, self.best)


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[Records]:
    """Open the records of a run; let a checkpoint that is on its way to the disk arrive."""
    folder, saving, before = run.plan.folder, run.session.config.checkpoints, run.before
    first = {"split": "eval", "step": 0, "epoch": 0.0, **before} if before else None
    done = run.learner.done
    files = folder.row_files if run.session.accelerator.is_main_process else {}
    logs = {
        name: RowLog(file, done, first if name == METRICS else None)
        for name, file in files.items()
        if name in run.writes or file.exists()
    }
    together = Together() if run.learner.policy.sharded else None
    writer = CheckpointWriter(
        folder.checkpoints,
        run.plan.tokenizer,
        saving.keep,
        background=saving.background,
        newest=done,
        together=together,
    )
    try:
        yield Records(run, logs, writer, Diagnosis(run.plan) if logs else None)
    except (Exception, GeneratorExit):
        with contextlib.suppress(Exception):
            writer.finish()
        raise
    finally:
        for log in logs.values():
            log.close()


def save_final(run: Run, outcome: Outcome) -> None:
    """Write the trained model as a complete Hugging Face folder, whole or not at all; every process calls it.

    Args:
        run: The run, whose policy has the weights that are written.
        outcome: What is said of them.
    """
    config, folder, policy = run.session.config, run.plan.folder, run.learner.policy
    is_main, largest = run.session.accelerator.is_main_process, policy.weights.largest()
    types = None if config.adapter else _final_types(run, largest)
    state = policy.weights.state()
    if not is_main:
        if policy.sharded:
            # The main process writes what it gathers, and compares that with what was written.
            policy.weights.attend_writing(state, types)
            policy.weights.attend_writing(state, types)
        return
    rounded = types is not None and types.rounds
    facts = {
        **digest_of_base(run.fingerprints),
        "optimizer steps": outcome.step,
        **({"selected": outcome.described} if outcome.by else {}),
        **({"weights": f"{types}, rounded from float32 after the figures were measured"} if rounded else {}),
    }
    card = card_of_run(
        config,
        folder,
        facts,
        run.plan.tokenizer,
        form=ADAPTER if config.adapter else MODEL,
        provenance=origin_of(policy.model).provenance,
        columns=outcome.columns(run.before),
        changes=changes_of(folder, outcome.step) if run.before else {},
    )
    # An adapter means nothing without its base.
    details = {FINGERPRINTS: run.fingerprints, HELD: policy.held_as} if config.adapter else {}
    with saved_folder(folder.final, "saving the trained model", details, waits=bool(policy.sharded)) as temporary:
        policy.weights.write(temporary, run.plan.tokenizer, state, types)
        (temporary / CARD).write_text(model_card(card), encoding="utf-8")
        policy.weights.check_written(temporary, state, types)
    if rounded:
        run.session.console.notice(_rounded(folder, types, outcome.step))


def _final_types(run: Run, largest: float) -> WeightTypes | None:
    """Return the types of the files that the model came from, which those of the trained model have; None: float32."""
    types = origin_of(run.learner.policy.model).types
    if largest <= types.most:
        return types
    what = f"{types}, the type of the base's files, cannot hold all trained weights (the largest is {largest:.3g})"
    run.session.console.warning(f"{what}: `final/` has them in float32")
    return None


def _rounded(folder: RunFolder, types: WeightTypes | None, step: int) -> str:
    """Say that the trained model was rounded, and where it is in float32."""
    said = f"`{folder.final}` has the weights in {types}, as the base's files do; the figures are those before rounding"
    saved = folder.checkpoint(step)
    if not saved.is_dir():
        return said
    export = f"dpo export {shlex.quote(str(folder.path))} --dtype float32 --to FOLDER"
    return f"{said}. `{saved}` has them in float32: `{export}` writes a model folder of it"


def summarize(run: Run, outcome: Outcome, diagnosis: Diagnosis, seconds: float) -> None:
    """Print what has become of the held-out figures, what was found on the way, and where everything is."""
    console, folder = run.session.console, run.plan.folder
    console.block()
    console.notice(f"done in {clock(seconds)}")
    if outcome.figures:
        console.result(figures_table(outcome.columns(run.before)))
    for line in before_and_after(answers_in(folder), outcome.step) if run.sampling else []:
        console.result(line)
    for name, line in zip(itertools.chain(["found"], itertools.repeat("")), diagnosis.summary(), strict=False):
        console.result(f"{name:<8} {line}")
    console.result(f"model    {folder.final}{f' ({outcome.described})' if outcome.by else ''}")
    console.result(f"metrics  {folder.metrics}")
    if run.sampling:
        console.result(f"samples  {folder.samples}")
    if page := report_at_end(folder, console):
        console.result(f"report   {page}")
