"""What a run is going to take: time, by what is measured here, and space on the disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import MicroBatch, Plan
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.pace import measure_pace, measured_layers
from dpo_cli.modeling.proof import REFUSALS
from dpo_cli.pipeline.passes import STEPS_LOOKED_AT
from dpo_cli.pipeline.setup import RunData
from dpo_cli.reporting.console import Console, gib
from dpo_cli.reporting.progress import clock
from dpo_cli.training.run_folder import RunFolder

_TOKENS_ON_CPU = 512
"""The most tokens that are measured on a CPU, where a pass of so many is as fast by the token as a larger one."""


@dataclass(frozen=True)
class DiskNeed:
    """What a run holds on the disk at most, in bytes.

    Attributes:
        model: The trained model.
        checkpoint: One checkpoint.
        num_checkpoints: As many as there are at once: one more than are kept, while the newest is written.
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


def disk_need(config: Config, folder: RunFolder, plan: Plan, policy: PreTrainedModel) -> DiskNeed:
    """Count what a run writes, and look at what is free for it; the policy's weights may be missing."""
    saving, weights = config.checkpoints, sum(parameter.nbytes for parameter in policy.parameters())
    checkpoint = weights + config.training.optimizer.state_bytes(policy)
    if config.reference.type == "synced":
        checkpoint += weights
    saved, behind = divmod(plan.num_steps, saving.every_steps)
    num_saved = saved + (behind > 0 and saving.at_end)
    above = next(path for path in (folder.path, *folder.path.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(above).free + sum(map(_bytes_below, (folder.checkpoints, folder.final)))
    return DiskNeed(weights, checkpoint, min(num_saved, saving.keep + 1), free)


def warn_of_disk(need: DiskNeed, folder: RunFolder, console: Console) -> None:
    """Say so where the disk is too small for a run."""
    if need.total > need.free:
        hint = "lower `checkpoints.keep`, raise `checkpoints.every_steps`, or choose another `output_dir`"
        console.warning(f"the disk under {folder.path} is too small: {need}; {hint}")


def time_rows(
    config: Config,
    data: RunData,
    plan: Plan,
    batches: Batches,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    accelerator: Accelerator,
    done: int,
) -> dict[str, str]:
    """Say how long a run is going to take, by a measurement of some seconds.

    Args:
        config: The run's settings.
        data: Its pairs.
        plan: Its steps.
        batches: How they go through the model.
        policy: The model; its weights may be missing.
        reference: The reference, which may be the same.
        accelerator: Knows device, precision and ranks.
        done: Steps that were taken before.
    """
    training = config.training
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    looked_at = list(itertools.islice(plan.steps(batches.cut, done, rank, num_ranks), STEPS_LOOKED_AT))
    if not looked_at:
        return {}
    cuts = [cut for step in looked_at for cut in step.micro_batches]
    typical = _typical(batches, cuts)
    try:
        pace = measure_pace(
            policy,
            batches.layout,
            batches(typical),
            accelerator.autocast,
            lambda model: training.optimizer.over(model, training.learning_rate, training.weight_decay),
            recomputed=training.gradient_checkpointing,
            collisions=config.objective.wpo,
        )
    except (*REFUSALS, MemoryError) as error:
        return {"time": f"not estimated: {next(iter(str(error).splitlines()), type(error).__name__)}"}
    size = batches.layout.tokens(batches.pairs.sizes, typical.pairs)
    tokens_of_step = _tokens(batches, cuts) / len(looked_at)
    tokens_of_pair = tokens_of_step * num_ranks * len(looked_at) / sum(step.num_pairs for step in looked_at)
    other = sum(p.numel() for p in reference.parameters()) / sum(p.numel() for p in policy.parameters())
    asked = pace.scoring * other * config.reference.holds_model
    step = tokens_of_step * (pace.training + asked) / size + pace.update
    scoring = tokens_of_pair / num_ranks / size
    num_asked = config.reference.num_asked(len({*plan.trained_on(), *data.held_out}), len(data.held_out))
    seconds = {
        "training": step * (plan.num_steps - done),
        "reference, unless it is cached": num_asked * scoring * pace.scoring * other,
        "evaluation": _num_evaluations(config, data, plan, done)
        * len(data.held_out)
        * scoring
        * (pace.scoring + asked),
    }
    parts = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items() if value)
    layers = " and ".join(map(str, measured_layers(policy)))
    speed = sum(_num_tokens(batches, cut) for cut in cuts) * num_ranks / len(looked_at) / step
    return {
        "speed": f"about {speed:,.0f} tokens a second, by {layers} of "
        f"{policy.config.get_text_config().num_hidden_layers} layers measured with random weights",
        "time": f"about {clock(sum(seconds.values()))} ({parts}), loading and saving aside",
    }


def _typical(batches: Batches, cuts: Iterable[MicroBatch]) -> MicroBatch:
    """Return a micro-batch of median size; on a CPU only the first of its pairs where it is large."""
    sizes, count = batches.pairs.sizes, batches.layout.tokens
    ordered = sorted(cuts, key=lambda cut: count(sizes, cut.pairs))
    pairs = ordered[len(ordered) // 2].pairs
    while batches.device.type == "cpu" and len(pairs) > 1 and count(sizes, pairs) > _TOKENS_ON_CPU:
        pairs = pairs[: len(pairs) - 1]
    return MicroBatch(pairs)


def _tokens(batches: Batches, cuts: Iterable[MicroBatch]) -> int:
    """Return the tokens of some forward passes, padding included."""
    return sum(batches.layout.tokens(batches.pairs.sizes, cut.pairs) for cut in cuts)


def _num_tokens(batches: Batches, cut: MicroBatch) -> int:
    """Return the tokens of a forward pass as `tokens_per_second` counts them."""
    sizes, pairs = batches.pairs.sizes, list(cut.pairs)
    return int((2 * sizes.prompts[pairs] + sizes.chosen[pairs] + sizes.rejected[pairs]).sum())


def _num_evaluations(config: Config, data: RunData, plan: Plan, done: int) -> int:
    """Return how often the held-out pairs are scored."""
    if not len(data.held_out):
        return 0
    every = config.evaluation.every_steps or plan.num_steps
    return plan.num_steps // every - done // every + (plan.num_steps % every > 0)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
