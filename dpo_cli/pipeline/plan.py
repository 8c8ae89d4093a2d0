"""What a run is going to do: the plan of its steps, the header, and the answer to `--dry-run`."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from rich.table import Table
from transformers import PreTrainedModel

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.memory import MemoryEstimate
from dpo_cli.pipeline import setup
from dpo_cli.pipeline.passes import compute_dtype
from dpo_cli.reporting.console import Console, gib
from dpo_cli.settings import Settings
from dpo_cli.training.optimizer import Optimizer, warmup_steps
from dpo_cli.training.run_folder import RunFolder


def make_plan(config: Config, data: setup.RunData) -> Plan:
    """Lay out all steps of a run.

    Raises:
        UserError: `training.max_steps`, or the first move of a reference, lies behind what the epochs give, and so
            has no effect.
    """
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
    training = config.training
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    precision = str(compute_dtype(accelerator)).removeprefix("torch.")
    return {
        "model": f"{config.model.name} ({type(policy).__name__})",
        "parameters": f"{sum(parameter.numel() for parameter in policy.parameters()):,}",
        "pairs": f"{len(data.train):,} to train on, {len(data.held_out):,} held out",
        **_left_out(data),
        "steps": _steps(plan),
        "loss": described_loss(config),
        "reference": _reference(config),
        "optimizer": ", ".join([_optimizer(training.optimizer), *_changed(training, "weight_decay", "max_grad_norm")]),
        "learning rate": f"{training.learning_rate:g}, {_schedule(config, plan)}",
        "device": f"{accelerator.device}, {precision}{processes}",
        "output": str(folder.path),
    }


def _steps(plan: Plan) -> str:
    """Say how many steps there are, of how many pairs, and how often they go through the data."""
    num_pairs, num_epochs = min(plan.pairs_per_step, len(plan.indices)), plan.epochs_after(plan.num_steps)
    return f"{plan.num_steps:,} of {num_pairs} pairs, {num_epochs:.4g} epoch{'s' * (num_epochs != 1)}"


def _schedule(config: Config, plan: Plan) -> str:
    """Say how the learning rate goes."""
    num_steps = warmup_steps(config.training.warmup_ratio, plan.num_steps)
    return config.training.schedule + (f", warm-up until step {num_steps:,}" if num_steps else "")


def _optimizer(optimizer: Optimizer) -> str:
    """Name the optimizer, with what is not as it is by default."""
    details = ", ".join(_changed(optimizer, *type(optimizer).model_fields))
    return f"{optimizer.type}{f' ({details})' if details else ''}"


def described_loss(config: Config) -> str:
    """Name the losses with β, and with whatever else decides them and is not as it is by default."""
    losses = config.objective.losses
    several = len(losses) > 1
    shown = []
    for loss in losses:
        names = [name for name in type(loss).model_fields if name not in ("type", "beta", *["weight"] * several)]
        beta = [f"beta {loss.beta:g}"] if hasattr(loss, "beta") else []
        details = ", ".join([*beta, *_changed(loss, *names)])
        weight = f"{loss.weight:g} · " if several else ""
        shown.append(f"{weight}{loss.type}{f' ({details})' if details else ''}")
    return " + ".join(shown)


def _changed(settings: Settings, *names: str) -> list[str]:
    """Say of some settings what they are, where that is not their default."""
    fields, values = type(settings).model_fields, settings.model_dump(mode="json")
    return [
        f"{name} {_shown(values[name])}"
        for name in names
        if getattr(settings, name) != fields[name].get_default(call_default_factory=True)
    ]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(part) if name == "type" else f"{name} {part}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


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
    batches: Batches,
    memory: MemoryEstimate,
    facts: Mapping[str, str],
    takes: Mapping[str, str],
    console: Console,
) -> None:
    """Print what a run would do, and what it would take, in memory part by part.

    Args:
        config: What to do.
        data: The run's pairs.
        batches: How they go through the model.
        memory: What that takes.
        facts: What `header` says of the run.
        takes: What it takes beside memory.
        console: Takes the plan.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    asked = config.training.layout
    proviso = ", if it proves exact" if asked == "auto" and batches.layout.name == "packed" else ""
    proviso_of_peak = "not all parts are there at once" if memory.counted else "and activations, not counted"
    rows = {
        **facts,
        "tokens of all pairs": f"{data.pairs.num_tokens():,}",
        "layout": f"{batches.layout.name}{proviso}",
        "tokens of a forward pass": f"at most {batches.micro_batch_tokens:,}, or one pair",
        **{f"memory: {name}": gib(size) for name, size in memory.parts().items() if size},
        "memory: at the peak": f"{gib(memory.peak)} ({proviso_of_peak})",
        **takes,
    }
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.block()
    console.result(table)


def out_of_reach(config: Config, data: setup.RunData, plan: Plan) -> dict[str, list[str]]:
    """Say which settings are beyond what the run has: under `set` those of the user, under `default` the others.

    None of them is an error: how many pairs and steps there are follows from the data, one configuration serves a
    short trial and the whole run, and a run's own config.yaml, in which every default is set, runs again.
    """
    evaluation, checkpoints, training = config.evaluation, config.checkpoints, config.training
    steps, pairs = plan.num_steps, len(data.train)
    never = f"is never reached: the run has {steps:,} steps"
    found: dict[str, list[str]] = {"set": [], "default": []}

    def note(group: Settings, name: str, line: str) -> None:
        found["set" if name in group.model_fields_set else "default"].append(line)

    if evaluation.every_steps and evaluation.every_steps > steps and len(data.held_out):
        what = f"`evaluation.every_steps` {evaluation.every_steps:,} {never}"
        note(evaluation, "every_steps", f"{what}; held-out pairs are scored before step 1 and after the last")
    if checkpoints.every_steps > steps:
        what = f"`checkpoints.every_steps` {checkpoints.every_steps:,} {never}"
        note(checkpoints, "every_steps", f"{what}; a crash before the last one would cost all of them")
    if training.pairs_per_step > pairs:
        what = f"`training.pairs_per_step` {training.pairs_per_step:,} is above the {pairs:,} training pairs"
        note(training, "pairs_per_step", f"{what}; every step has all of them")
    return found
