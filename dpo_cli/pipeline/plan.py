"""What a run is going to do: the plan of its steps, the header, and the answer to `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.config import Config
from dpo_cli.errors import UserError
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.passes import compute_dtype
from dpo_cli.reporting.console import Console, gib
from dpo_cli.training.run_folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from dpo_cli.data.schedule import Plan
    from dpo_cli.modeling.batch import Batches
    from dpo_cli.modeling.memory import MemoryEstimate


def make_plan(config: Config, data: setup.RunData) -> Plan:
    """Lay out all steps of a run.

    Raises:
        UserError: `training.max_steps`, or the first move of a reference, lies behind what the epochs give, and so
            has no effect.
    """
    from dpo_cli.data.schedule import Plan

    training = config.training
    plan = Plan(
        indices=data.train,
        lengths=data.pairs.sizes.longest,
        pairs_per_step=training.pairs_per_step,
        epochs=training.epochs,
        max_steps=training.max_steps,
        shuffle=training.shuffle,
        seed=training.seed,
    )
    if training.max_steps and training.max_steps > plan.steps_by_epochs:
        what = f"`training.max_steps` {training.max_steps} is never reached"
        where = f"{training.epochs:g} epochs of {len(data.train)} pairs are {plan.steps_by_epochs} steps"
        raise UserError(what, where, "raise `training.epochs`, or leave `training.max_steps` out")
    reference = config.reference
    if reference.type == "synced" and reference.every_steps > plan.num_steps:
        what = f"the reference never moves: `reference.every_steps` is {reference.every_steps}"
        raise UserError(what, f"the run has {plan.num_steps} steps", "lower `reference.every_steps`")
    return plan


def header(
    config: Config,
    folder: RunFolder,
    accelerator: Accelerator,
    data: setup.RunData,
    plan: Plan,
    policy: PreTrainedModel,
) -> dict[str, str]:
    """Say what is about to run."""
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    precision = str(compute_dtype(accelerator)).removeprefix("torch.")
    return {
        "model": f"{config.model.name} ({type(policy).__name__})",
        "parameters": f"{sum(parameter.numel() for parameter in policy.parameters()):,}",
        "pairs": f"{len(data.train):,} to train on, {len(data.held_out):,} held out",
        **_left_out(data),
        "steps": f"{plan.num_steps:,} of {min(plan.pairs_per_step, len(plan.indices))} pairs",
        "loss": str(config.objective),
        "reference": _reference(config),
        "device": f"{accelerator.device}, {precision}{processes}",
        "output": str(folder.path),
    }


def _reference(config: Config) -> str:
    if config.reference.type == "none":
        return "none, and none is needed"
    return f"{config.reference.type}, {config.reference.model or 'the policy before step 1'}"


def _left_out(data: setup.RunData) -> dict[str, str]:
    """Say what `data.drop` leaves out, where it names anything."""
    return {"left out": setup.shown_counts(data.left_out)} if data.left_out else {}


def print_plan(
    config: Config,
    data: setup.RunData,
    plan: Plan,
    batches: Batches,
    memory: MemoryEstimate,
    num_parameters: int,
    console: Console,
) -> None:
    """Print what a run would do, and what it would take in memory, part by part."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    asked = config.training.layout
    proviso = ", if it proves exact" if asked == "auto" and batches.layout.name == "packed" else ""
    proviso_of_peak = "not all parts are there at once" if memory.counted else "and activations, not counted"
    rows = {
        "model": config.model.name,
        "parameters": f"{num_parameters:,}",
        "training pairs": f"{len(data.train):,}",
        "held-out pairs": f"{len(data.held_out):,}",
        **_left_out(data),
        "tokens of all pairs": f"{data.pairs.num_tokens():,}",
        "optimizer steps": f"{plan.num_steps:,} of {min(plan.pairs_per_step, len(plan.indices))} pairs",
        "layout": f"{batches.layout.name}{proviso}",
        "tokens of a forward pass": f"at most {batches.micro_batch_tokens:,}, or one pair",
        **{f"memory: {name}": gib(size) for name, size in memory.parts().items() if size},
        "memory: at the peak": f"{gib(memory.peak)} ({proviso_of_peak})",
        "output folder": config.output_dir,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.result(table)
