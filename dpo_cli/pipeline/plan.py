"""What a run is going to do, known before its weights are loaded: its pairs, its steps, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from dpo_cli.config import Config
from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.errors import UserError
from dpo_cli.evaluation.findings.remedies import USUAL_RATES
from dpo_cli.modeling.adapters.adapted import above_full_rank
from dpo_cli.modeling.adapters.files import holds_adapter
from dpo_cli.modeling.folders.model_names import whole_model
from dpo_cli.modeling.folders.tokenizers import generation_config
from dpo_cli.modeling.held import Split
from dpo_cli.modeling.memory import resident_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.routing import check_routers, experts_without_adapter
from dpo_cli.pipeline.alike import check_pairs
from dpo_cli.pipeline.memory import check_memory
from dpo_cli.pipeline.models import reference_sketch, trained_policy
from dpo_cli.pipeline.pairs import RunData, load_tokenizer, report_folder, run_data, shown_counts
from dpo_cli.pipeline.resume import check_length, ended_early
from dpo_cli.pipeline.session import Session
from dpo_cli.reporting.secrets import covered
from dpo_cli.settings import Settings
from dpo_cli.system.text import several
from dpo_cli.training.checks import check_columns, check_ends, check_fits, check_tokens
from dpo_cli.training.optimizer import Optimizer, warmup_steps
from dpo_cli.training.run_folder import DATA_CHECK, FIRST_DAY, PLAN, RunFolder, RunState

_LEAST_OF_AN_ADAPTER, _MOST_OF_ALL_WEIGHTS = 2e-6, 5e-5
"""Learning rates below and above which a run is warned of: what many publish is well within."""


@dataclass(frozen=True)
class PlannedRun:
    """A run before its weights are loaded.

    Attributes:
        session: Says what to do.
        folder: Where it goes.
        day: The day on which it began: what a template is told that asks for the date.
        sketch: The policy without its weights.
        reference: The reference without its weights; the same where it is the policy before step 1.
        tokenizer: The policy's.
        data: Its pairs.
        steps: Its steps.
        program_bytes: What the process holds so far.
    """

    session: Session
    folder: RunFolder
    day: date
    sketch: Policy
    reference: Policy
    tokenizer: Any
    data: RunData
    steps: Plan
    program_bytes: int


def planned(session: Session, folder: RunFolder, *, resume: bool, extend: bool) -> PlannedRun | None:
    """Read the pairs and lay out the steps of a run; refuse early one for which there is no memory.

    Args:
        session: Says what to do.
        folder: Where the run goes.
        resume: Whether it goes on from what is there.
        extend: Whether it may then have more steps, though the learning rate would have taken another course.

    Returns:
        The run, or None where it is finished.

    Raises:
        UserError: Something is wrong that the user can fix.
    """
    config, finished = session.config, resume and folder.state() is RunState.FINISHED
    program_bytes, sketch = resident_bytes(), trained_policy(session, empty=True)
    if config.objective.router_aux:
        check_routers(sketch.model)
    other = reference_sketch(session, sketch)
    if not finished:
        check_memory(session, sketch, other, program_bytes)
    # A template that writes the date writes that of the first day, also when the run goes on.
    day = session.agreed((folder.first_day() if resume else None) or date.today())
    with session.accelerator.main_process_first():
        tokenizer, tokenize = load_tokenizer(config, session.console, day)
        data = run_data(config, tokenize, session.console)
    check_pairs(session, data.fingerprint, "`data`")
    steps = make_plan(config, data)
    if resume and (longer := check_length(config, folder, steps, extend=extend)):
        session.console.notice(longer)
    elif finished:
        session.console.notices(folder.nothing_left(config.model_dump(mode="json"), extend=extend))
        if early := ended_early(config, folder, steps.num_steps):
            session.console.notice(early)
        return None
    return PlannedRun(session, folder, day, sketch, other, tokenizer, data, steps, resident_bytes())


def check_data(run: PlannedRun) -> None:
    """Say which settings have no effect on a run, and prove of its pairs what can be proved without the model.

    Raises:
        UserError: Something does not hold.
    """
    config, console, data = run.session.config, run.session.console, run.data
    for whose, lines in out_of_reach(config, data, run.steps).items():
        for line in lines:
            console.warning(line) if whose == "set" else console.notice(f"note: {line} (by default)")
    check_fits(data.pairs, run.sketch, "`model.name`")
    if run.reference is not run.sketch:
        check_fits(data.pairs, run.reference, "`reference.model`")
    ends = end_tokens(run.tokenizer, generation_config(config.model.name, config.model.trust))
    for proved in check_tokens(data.pairs, run.tokenizer, ends):
        console.notice(f"checked: {proved}")
    found = check_ends(data.pairs, run.tokenizer, ends), check_columns(data.pairs, config.objective)
    for warning in (unusual_rate(config), _useless_rank(run.sketch), _unreached_experts(run.sketch), *found):
        if warning:
            console.warning(warning)


def _unreached_experts(sketch: Policy) -> str:
    """Say so where an adapter leaves out experts, which may be most of a model."""
    num_experts = experts_without_adapter(sketch.model) if sketch.weights.described else 0
    if not num_experts:
        return ""
    sizes = sketch.sizes()
    shown = f"{num_experts:,} of the model's {sizes.numbers - sizes.num_trained:,} weights"
    return f"{shown} are in experts that have no adapter: they stay as they are"


def _useless_rank(sketch: Policy) -> str:
    """Say so where an adapter has a larger rank than the product of its matrices can have."""
    if not sketch.weights.described or not (found := above_full_rank(sketch.model)):
        return ""
    shown = ", ".join(f"{name} ({side})" for name, side in found.items())
    return (
        f"`adapter.rank` is above the smaller side of a matrix: {shown}; no more rank than that has an effect there, "
        "and the rest takes memory: lower it, or leave these layers out of `adapter.targets`"
    )


def unusual_rate(config: Config) -> str:
    """Say so where the learning rate is one for an adapter and all weights train, or the other way round."""
    rate, low = config.training.learning_rate, config.adapter is not None
    if not (rate < _LEAST_OF_AN_ADAPTER if low else rate > _MOST_OF_ALL_WEIGHTS):
        return ""
    what = "low for an adapter" if low else "high where all weights train"
    with_adapter, whole = USUAL_RATES["an adapter"], USUAL_RATES["all weights"]
    usual = f"{with_adapter} are usual with an adapter, {whole} where all weights train"
    return f"`training.learning_rate` {rate:g} is {what}: {usual}"


def make_plan(config: Config, data: RunData) -> Plan:
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
        pairs = several(len(data.train), "pair")
        steps = several(plan.steps_by_epochs, "step")
        where = f"{several(training.epochs, 'epoch')} of {pairs}: {steps}"
        raise UserError(what, where, "raise `training.epochs`, or leave `training.max_steps` out")
    reference = config.reference
    if reference.type == "synced" and reference.every_steps > plan.num_steps:
        what = f"the reference never moves: the run has {several(plan.num_steps, 'step')}"
        where = f"`reference.every_steps: {reference.every_steps}`"
        raise UserError(what, where, f"set it to {plan.num_steps} at most")
    return plan


def header(run: PlannedRun) -> dict[str, str]:
    """Say what is about to run."""
    session, config, training = run.session, run.session.config, run.session.config.training
    return {
        "model": _model(config.model.name, run.sketch),
        "parameters": _parameters(run.sketch),
        **_held(session),
        "pairs": f"{len(run.data.train):,} to train on, {len(run.data.held_out):,} held out",
        **_left_out(run.data),
        "steps": f"{'at most ' * (config.evaluation.patience is not None)}{_steps(run.steps)}",
        **_best(config),
        "loss": described_loss(config),
        "reference": _reference(config),
        "optimizer": ", ".join([_optimizer(training.optimizer), *_changed(training, "weight_decay", "max_grad_norm")]),
        "learning rate": f"{training.learning_rate:g}, {_schedule(config, run.steps)}",
        "device": _device(session),
        "output": str(run.folder.path),
    }


def noted(run: PlannedRun) -> dict[str, Any]:
    """Return what environment.json has of a run beside what runs it."""
    return {
        FIRST_DAY: run.day.isoformat(),
        PLAN: {name: covered(fact) for name, fact in header(run).items()},
        DATA_CHECK: str(report_folder(run.session.config, run.data.pairs)),
    }


def _device(session: Session) -> str:
    """Name the device and its precision, how many processes there are, and how weights are sharded over them."""
    num_processes, shards = session.accelerator.num_processes, session.shards
    parts = [f"{session.assumed} (assumed)" if session.assumed else str(session.accelerator.device)]
    parts += [session.precision.name, *([f"{num_processes} processes"] if num_processes > 1 else [])]
    return ", ".join(parts + ([f"weights in {several(shards.count, 'shard')}"] if shards else []))


def _model(name: str, policy: Policy) -> str:
    """Name the model; of an adapter that is one, its base too."""
    merged = f": that adapter, merged into {whole_model(name)}" if holds_adapter(name) else ""
    return f"{name} ({policy}){merged}"


def _parameters(policy: Policy) -> str:
    """Say how many weights there are and how they are held, and how many of them train where not all do."""
    sizes = policy.sizes()
    if sizes.num_trained == sizes.numbers:
        return f"{sizes.numbers:,}"
    which = f" ({policy.weights.described})" if policy.weights.described else ""
    return f"{sizes.numbers:,}, of which {sizes.num_trained:,} are trained{which}"


def _held(session: Session) -> dict[str, str]:
    """Say in what the weights are held; and gradients and what the optimizer keeps, where that is worth a word."""
    held, training = session.held, session.config.training
    # Split weights are whole values where processes share them.
    split = held if isinstance(held, Split) and not session.shards else None
    if isinstance(held, Split):
        values = "bfloat16 and the 16 bits it lacks" if split else f"{held.on_shards()}, gathered as {held.dtype}"
        parts = [f"split: {values}"]
    else:
        parts = [f"{held.type} in linear layers, {held.dtype} elsewhere" if held.type != held.dtype else held.dtype]
        parts += ["float32 in the adapter"] * (held.type != "float32")
    gradients, kept = split.gradients if split else "float32", training.optimizer.kept_in
    if session.accelerator.device.type != "cpu" or isinstance(held, Split) or kept != "float32":
        where = " in the host's memory" if training.offload else ""
        parts += [f"gradients in {gradients}", f"the optimizer's state in {kept}{where}"]
    return {"weights": ", ".join(parts)}


def _steps(plan: Plan) -> str:
    """Say how many steps there are, of how many pairs, and how often they go through the data."""
    num_pairs, num_epochs = min(plan.pairs_per_step, len(plan.indices)), plan.epochs_after(plan.num_steps)
    return f"{plan.num_steps:,} of {several(num_pairs, 'pair')}, {several(num_epochs, 'epoch')}"


def _best(config: Config) -> dict[str, str]:
    """Say which step the trained model is of, and when the run stops early, where that is not the last step."""
    evaluation, keep = config.evaluation, config.checkpoints.keep_best
    if evaluation.best_by is None:
        return {}
    parts = [f"the best of all evaluations by {evaluation.best_by}"]
    if evaluation.patience is not None:
        parts.append(f"stopping after {evaluation.patience} without a better one")
    parts += [f"keeping the best {keep}"] if keep > 1 else []
    return {"final": ", ".join(parts)}


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
        return "none (not needed)"
    return f"{config.reference.type}, {config.reference.model or 'the policy before step 1'}"


def _left_out(data: RunData) -> dict[str, str]:
    """Say what `data.drop` leaves out, where it names anything."""
    return {"left out": shown_counts(data.left_out)} if data.left_out else {}


def out_of_reach(config: Config, data: RunData, plan: Plan) -> dict[str, list[str]]:
    """Say which settings are beyond what the run has: under `set` those of the user, under `default` the others.

    None of them is an error: how many pairs and steps there are follows from the data, one configuration serves a
    short trial and the whole run, and a run's own config.yaml, in which every default is set, runs again.
    """
    evaluation, checkpoints, training = config.evaluation, config.checkpoints, config.training
    steps, pairs = plan.num_steps, len(data.train)
    never = f"is never reached: the run has {several(steps, 'step')}"
    found: dict[str, list[str]] = {"set": [], "default": []}

    def note(group: Settings, name: str, line: str) -> None:
        found["set" if name in group.model_fields_set else "default"].append(line)

    if evaluation.every_steps and evaluation.every_steps > steps and len(data.held_out):
        what = f"`evaluation.every_steps` {evaluation.every_steps:,} {never}"
        note(evaluation, "every_steps", f"{what}; held-out pairs are scored before step 1 and after the last")
    if checkpoints.every_steps > steps:
        what = f"`checkpoints.every_steps` {checkpoints.every_steps:,} {never}"
        note(checkpoints, "every_steps", f"{what}; a crash before the last step would lose all steps")
    num_evaluations = -(-steps // (evaluation.every_steps or steps))
    if evaluation.patience and evaluation.patience >= num_evaluations:
        what = f"`evaluation.patience` {evaluation.patience:,} is never exhausted"
        note(evaluation, "patience", f"{what}: the run has {several(num_evaluations, 'evaluation')} after step 1")
    if training.pairs_per_step > pairs:
        what = f"`training.pairs_per_step` {training.pairs_per_step:,} is above the {several(pairs, 'training pair')}"
        note(training, "pairs_per_step", f"{what}; every step uses all of them")
    return found
