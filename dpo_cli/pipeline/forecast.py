"""What a run is going to take, for `--dry-run`: memory by its sizes, time by what is measured here, and disk space."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import MicroBatch, Plan
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import adapter_folder
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.modeling.pace import Pace, measure_pace, measured_layers
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.proof import REFUSALS
from dpo_cli.pipeline.memory import STEPS_LOOKED_AT, settle_tokens
from dpo_cli.pipeline.models import expected_layout
from dpo_cli.pipeline.plan import PlannedRun, check_data, header, planned
from dpo_cli.pipeline.prepare import check, show_check
from dpo_cli.pipeline.session import assuming
from dpo_cli.preference.reference_work import refuse_other_shapes
from dpo_cli.reporting.console import Console, gib
from dpo_cli.reporting.progress import clock
from dpo_cli.system.assumed_devices import AssumedDevices
from dpo_cli.system.text import several
from dpo_cli.training.checkpoints import newest_step
from dpo_cli.training.checks import check_base_by_name
from dpo_cli.training.run_folder import RunFolder

_TOKENS_ON_CPU = 512
"""The most tokens that are measured on a CPU, where a pass of so many is as fast by the token as a larger one."""


def forecast(config: Config, console: Console, assumed: AssumedDevices) -> None:
    """Check all of a run that can be checked without its weights; print what it would take on devices not here.

    Raises:
        UserError: Something is wrong that the user can fix, or the run does not fit into their memory.
    """
    with assuming(config, console, assumed) as session:
        plan = planned(session, RunFolder(Path(config.output_dir)), resume=False, extend=False)
        assert plan is not None, "the run is not resumed, and so not finished"
        show_forecast(plan, resume=False)


def show_forecast(run: PlannedRun, *, resume: bool) -> None:
    """Check all of a run that can be checked without its weights; print what it would do and what it would take.

    Raises:
        UserError: Something is wrong that the user can fix.
    """
    session, policy, pairs = run.session, run.sketch, run.data.pairs
    check_data(run)
    if session.config.adapter and session.config.adapter.start:
        for line in check_base_by_name(adapter_folder(session.config.adapter.start), session.config.model.name):
            session.console.notice(line)
    if session.config.reference.type == "synced":
        refuse_other_shapes(run.reference, policy)
    batches = Batches(pairs, expected_layout(session, policy, pairs), 1, session.accelerator.device)
    batches, memory = settle_tokens(run, policy, batches)
    done = newest_step(run.folder.checkpoints) if resume else 0
    disk = disk_need(session.config, run.folder, run.steps, policy)
    time = _time(run, batches, done) if session.assumed is None else {}
    rows = {**header(run), **_passes(run, batches, memory), **time, "disk": str(disk)}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    session.console.block()
    session.console.result(table)
    warn_of_disk(disk, run.folder, session.console)
    session.console.result("")
    show_check(check(session.config, run.data, run.tokenizer), session.console)


def _passes(run: PlannedRun, batches: Batches, memory: MemoryEstimate) -> Mapping[str, str]:
    """Say how pairs go through the model and what that takes in memory, part by part."""
    can_fail = run.session.config.training.layout == "auto" and batches.layout.needs_proof
    about_peak = "not all parts exist at the same time" if memory.counted else "and activations, not counted"
    session = run.session
    whose = "memory" if session.accelerator.num_processes == 1 else "memory of each process"
    free = {f"{whose}: free": gib(session.assumed.memory)} if session.assumed else {}
    return {
        "tokens of all pairs": f"{run.data.pairs.num_tokens():,}",
        "layout": f"{batches.layout.name}{', if it is proved exact' if can_fail else ''}",
        "tokens of a forward pass": f"at most {batches.micro_batch_tokens:,}, or one pair",
        **{f"{whose}: {name}": gib(size) for name, size in memory.parts().items() if size},
        f"{whose}: at the peak": f"{gib(memory.peak)} ({about_peak})",
        **free,
    }


def _time(run: PlannedRun, batches: Batches, done: int) -> Mapping[str, str]:
    """Say how long a run is going to take, by a measurement of some seconds.

    Args:
        run: The run.
        batches: How its pairs go through the model.
        done: Steps that were taken before.
    """
    rank = data_rank(run.session.accelerator)
    steps = list(itertools.islice(run.steps.steps(batches.cut, done, *rank), STEPS_LOOKED_AT))
    if not steps:
        return {}
    cuts = [cut for step in steps for cut in step.micro_batches]
    typical = _typical(batches, cuts)
    try:
        pace = _measured_pace(run, batches, typical)
    except (*REFUSALS, MemoryError, UserError) as error:
        return {"time": f"not estimated: {next(iter(str(error).splitlines()), type(error).__name__)}"}
    size = batches.layout.tokens(batches.pairs.sizes, typical.pairs)
    tokens_of_step = sum(batches.layout.tokens(batches.pairs.sizes, cut.pairs) for cut in cuts) / len(steps)
    tokens_of_pair = tokens_of_step * len(steps) / sum(step.num_pairs for step in steps)
    other = run.reference.sizes().numbers / run.sketch.sizes().numbers
    asked = pace.scoring * other * run.session.config.reference.holds_model
    step = tokens_of_step * (pace.training + asked) / size + pace.update
    num_asked = _num_asked(run)
    seconds = {
        "training": step * (run.steps.num_steps - done),
        "reference, unless it is cached": num_asked * tokens_of_pair / size * pace.scoring * other,
        "evaluation": _num_scored(run, done) * tokens_of_pair / size * (pace.scoring + asked),
    }
    parts = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items() if value)
    layers, config = " and ".join(map(str, measured_layers(run.sketch.model))), run.sketch.model.config
    speed = sum(_num_tokens(batches, cut) for cut in cuts) * rank.num_ranks / len(steps) / step
    return {
        "speed": f"about {speed:,.0f} tokens per second, by {layers} of "
        f"{several(config.get_text_config().num_hidden_layers, 'layer')} measured with random weights",
        "time": f"about {clock(sum(seconds.values()))} ({parts}), without loading and saving",
    }


def _measured_pace(run: PlannedRun, batches: Batches, typical: MicroBatch) -> Pace:
    """Measure what a micro-batch takes."""
    config, training = run.session.config, run.session.config.training

    def build(trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return training.optimizer.over(trained, training.learning_rate, training.weight_decay)

    return measure_pace(
        run.sketch,
        batches.layout,
        batches(typical),
        run.session.accelerator.autocast,
        build,
        recomputed=training.gradient_checkpointing,
        collisions=config.objective.wpo,
    )


def _num_asked(run: PlannedRun) -> int:
    """Return of how many pairs the reference is asked for before step 1."""
    held_out = run.data.held_out
    return run.session.config.reference.num_asked(len({*run.steps.trained_on(), *held_out}), len(held_out))


def _num_scored(run: PlannedRun, done: int) -> int:
    """Return how many held-out pairs are scored in all evaluations together."""
    num_steps = run.steps.num_steps
    every = run.session.config.evaluation.every_steps or num_steps
    num_evaluations = num_steps // every - done // every + (num_steps % every > 0)
    return num_evaluations * len(run.data.held_out)


def _typical(batches: Batches, cuts: Iterable[MicroBatch]) -> MicroBatch:
    """Return a micro-batch of median size; on a CPU only the first of its pairs where it is large."""
    sizes, count = batches.pairs.sizes, batches.layout.tokens
    ordered = sorted(cuts, key=lambda cut: count(sizes, cut.pairs))
    pairs = ordered[len(ordered) // 2].pairs
    while batches.device.type == "cpu" and len(pairs) > 1 and count(sizes, pairs) > _TOKENS_ON_CPU:
        pairs = pairs[: len(pairs) - 1]
    return MicroBatch(pairs)


def _num_tokens(batches: Batches, cut: MicroBatch) -> int:
    """Return the tokens of a forward pass as `tokens_per_second` counts them."""
    sizes, pairs = batches.pairs.sizes, list(cut.pairs)
    return int((2 * sizes.prompts[pairs] + sizes.chosen[pairs] + sizes.rejected[pairs]).sum())


@dataclass(frozen=True)
class DiskNeed:
    """What a run holds on the disk at most, in bytes.

    Attributes:
        model: The trained model, or the adapter alone.
        checkpoint: One checkpoint.
        num_checkpoints: As many as there are at once: one more than are kept, the best included, while one is written.
        free: What is free where the run is written, an older run in its folder counted as free.
    """

    model: int
    checkpoint: int
    num_checkpoints: int
    free: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.num_checkpoints * self.checkpoint

    def __str__(self) -> str:
        """Say what is needed, and what is there."""
        checkpoints = f" and {self.num_checkpoints} × {gib(self.checkpoint)} of checkpoints" * bool(
            self.num_checkpoints
        )
        return f"{gib(self.total)} at most (model {gib(self.model)}{checkpoints}); {gib(self.free)} are free"


def disk_need(config: Config, folder: RunFolder, plan: Plan, policy: Policy) -> DiskNeed:
    """Count what a run writes, and look at what is free for it; the policy's weights may be missing."""
    weights = policy.sizes().saved
    checkpoint = weights + config.training.optimizer.state_bytes(policy.weights.trained())
    if config.reference.type == "synced":
        checkpoint += weights
    above = next(path for path in (folder.path, *folder.path.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(above).free + sum(map(_bytes_below, (folder.checkpoints, folder.final)))
    return DiskNeed(weights, checkpoint, _num_checkpoints(config, plan.num_steps), free)


def _num_checkpoints(config: Config, num_steps: int) -> int:
    """Return how many checkpoints there are at once, at most."""
    saving, chooses = config.checkpoints, config.evaluation.best_by is not None
    kept = saving.keep + max(saving.keep_best, 1) * chooses
    # Any evaluation may be the best so far, and then saves one.
    every = [saving.every_steps, *([config.evaluation.every_steps or num_steps] if chooses else [])]
    saved = sum(num_steps // one for one in every) - num_steps // math.lcm(*every) * chooses
    saved += (saving.at_end or chooses) and all(num_steps % one for one in every)
    return min(saved, kept + 1)


def warn_of_disk(need: DiskNeed, folder: RunFolder, console: Console) -> None:
    """Say so where the disk is too small for a run."""
    if need.total > need.free:
        hint = (
            "lower `checkpoints.keep` or `keep_best`, raise `checkpoints.every_steps`, or choose another `output_dir`"
        )
        console.warning(f"the disk under {folder.path} is too small: {need}; {hint}")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
