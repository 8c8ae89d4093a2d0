"""What a run takes in memory: whether it fits at all, and how many tokens a forward pass may have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dpo_cli.config import Config
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch, largest
from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.memory import MemoryEstimate, activation_bytes, free_bytes, logits_bytes
from dpo_cli.modeling.pace import enough_tokens
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.proof import REFUSALS
from dpo_cli.modeling.sizes import Sizes
from dpo_cli.pipeline.models import Settle, trained_policy
from dpo_cli.pipeline.session import Session
from dpo_cli.preference.reference import Cached
from dpo_cli.reporting.console import gib
from dpo_cli.training.optimizer import Adafactor

if TYPE_CHECKING:
    from dpo_cli.pipeline.plan import PlannedRun

SHARE_OF_FREE = 0.8
"""How much of the free memory `micro_batch_tokens: auto` lets a run take."""

_FEWEST_TOKENS = 64
STEPS_LOOKED_AT = 500
"""Steps of a run that are looked at for what its forward passes take."""


def check_memory(session: Session, policy: Policy, reference: Policy, program_bytes: int) -> None:
    """Refuse a run that cannot fit into memory, whatever its pairs are, before anything is loaded.

    Args:
        session: Says what is held beside the weights, on which device, and how many processes share it.
        policy: The policy; its weights may be missing.
        reference: The reference; the policy where no other model is named.
        program_bytes: What the process holds already.

    Raises:
        UserError: It does not fit; it names the parts, and what would fit.
    """

    def needed(config: Config) -> MemoryEstimate:
        changed = session.under(config)
        same = (config.adapter, config.model) == (session.config.adapter, session.config.model)
        model = policy if same else trained_policy(changed, empty=True)
        other = reference if config.reference.model else model
        memory = _without_passes(changed, model, other, program_bytes)
        return dataclasses.replace(memory, program=0)

    free = free_bytes(session.accelerator.device) // _sharing(session)
    least = needed(session.config)
    if least.peak <= free:
        return
    where = f"`model.name: {session.config.model.name}`"
    shown = ", ".join(f"{name} {gib(size)}" for name, size in least.parts().items() if size)
    what = f"training needs at least {gib(least.peak)} of memory, but {gib(free)} are free ({shown})"
    # The least that the run takes as it trains now, and with an adapter in place of all weights.
    smallest = {session.config.adapter is None: ("", least.peak)}
    for settings, smaller in _smaller(session.config):
        try:
            peak = needed(smaller).peak
        except UserError:
            # It has no layers that an adapter or few bits could be put to.
            continue
        smallest[smaller.adapter is None] = (settings, peak)
        if peak <= free:
            raise UserError(what, where, f"set {settings}")
    numbers = policy.sizes().numbers
    sizes = [
        f"{numbers * free / peak / 1e9:.2g} billion parameters" + f" (under {settings})" * bool(settings)
        for settings, peak in smallest.values()
    ]
    raise UserError(what, where, f"choose a model of at most {', or '.join(sizes)}, or a machine with more memory")


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield settings that take less memory, in the order of what they cost, with the configuration that has them."""
    settings, lighter = [], config
    if config.checkpoints.background:
        saving = config.checkpoints.model_copy(update={"background": False})
        settings, lighter = ["`checkpoints.background: false`"], config.model_copy(update={"checkpoints": saving})
        yield _listed(settings), lighter
    if config.reference.holds_model:
        lighter = lighter.model_copy(update={"reference": Cached(model=config.reference.model)})
        settings = [*settings, "`reference.type: cached`"]
        yield _listed(settings), lighter
    if config.adapter is None:
        if config.training.optimizer.type != "adafactor":
            training = config.training.model_copy(update={"optimizer": Adafactor()})
            yield (
                _listed([*settings, "`training.optimizer: adafactor`"]),
                lighter.model_copy(update={"training": training}),
            )
        if missing_package("peft", "adapters", ""):
            return
        # Of an adapter, neither a reference nor a copy of its state takes much.
        settings, lighter = ["`adapter: lora`"], config.model_copy(update={"adapter": Lora()})
        yield _listed(settings), lighter
    if lighter.model.quantize is None and not missing_package("bitsandbytes", "quantize", ""):
        model = lighter.model.model_copy(update={"quantize": "nf4"})
        yield _listed([*settings, "`model.quantize: nf4`"]), lighter.model_copy(update={"model": model})


def _listed(settings: Sequence[str]) -> str:
    return " and ".join(settings)


def _sharing(session: Session) -> int:
    """Return how many processes share the memory that is free: on a CPU all of them."""
    return session.accelerator.num_processes if session.accelerator.device.type == "cpu" else 1


def _without_passes(session: Session, policy: Policy, reference: Policy, program_bytes: int) -> MemoryEstimate:
    """Estimate what a run takes whatever its pairs are: without activations and logits."""
    config, sizes, on_cpu = session.config, policy.sizes(), session.accelerator.device.type == "cpu"
    state = config.training.optimizer.state_bytes(policy.trained())
    saved = sizes.saved + state + (sizes.saved if config.reference.type == "synced" else 0)
    return MemoryEstimate(
        program=program_bytes if on_cpu else 0,
        weights=sizes.held,
        reference=_reference_bytes(config, sizes, reference),
        optimizer=state,
        gradients=sizes.trained,
        activations=0,
        counted=False,
        logits=0,
        copy=saved if on_cpu and config.checkpoints.background else 0,
        several=False,
    )


def _reference_bytes(config: Config, policy: Sizes, reference: Policy) -> int:
    """Return what the reference holds beside a policy: of one that shares its weights, what is not shared."""
    if not config.reference.holds_model:
        return 0
    if config.reference.model:
        return reference.sizes().held
    # One that moves has weights of its own also where switching an adapter off would answer as before step 1.
    return policy.beginning or (policy.saved if config.reference.type == "synced" else 0)


def settle_tokens(
    run: PlannedRun, policy: Policy, batches: Batches, resumed: int | None = None
) -> tuple[Batches, MemoryEstimate]:
    """Settle how many tokens a forward pass has, and estimate what the run then takes in memory.

    `auto` is as many as still gain speed on this machine, halved until the run fits into `SHARE_OF_FREE` of the
    memory that is free.

    Args:
        run: Its session asks for a number, or for `auto`, and is told where the memory will not do.
        policy: The policy; its weights may be missing.
        batches: The pairs in their layout; how many tokens a pass has is replaced.
        resumed: The number that a run to be resumed began with, or None.

    Returns:
        The batches under that number, the same in all processes, and the estimate.
    """
    session = run.session

    def with_budget(num_tokens: int) -> tuple[Batches, MemoryEstimate]:
        cut = dataclasses.replace(batches, micro_batch_tokens=num_tokens)
        return cut, _estimate(run, policy, cut)

    asked = session.config.training.micro_batch_tokens
    if asked != "auto":
        return with_budget(asked)
    if resumed:
        return with_budget(resumed)
    settled, memory = with_budget(wanted_tokens(session))
    free = (free_bytes(session.accelerator.device) + policy.sizes().present) // _sharing(session)
    while memory.peak - memory.program > SHARE_OF_FREE * free and settled.micro_batch_tokens > _FEWEST_TOKENS:
        fewer, smaller = with_budget(settled.micro_batch_tokens // 2)
        if smaller.peak >= memory.peak:
            break
        settled, memory = fewer, smaller
    if memory.peak - memory.program > free:
        what = f"the run takes about {memory.peak / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        session.console.warning(f"{what}; try {', '.join(_advice(session.config))}")
    fewest = min(session.of_all(settled.micro_batch_tokens))
    return (settled, memory) if fewest == settled.micro_batch_tokens else with_budget(fewest)


def wanted_tokens(session: Session) -> int:
    """Return the tokens of a forward pass that are asked for; `auto`: as many as still gain speed."""
    asked = session.config.training.micro_batch_tokens
    return enough_tokens(session.accelerator.device) if asked == "auto" else asked


def _advice(config: Config) -> Iterator[str]:
    """Yield what takes less memory and is not set yet."""
    if not config.training.gradient_checkpointing:
        yield "`training.gradient_checkpointing: true`"
    if config.adapter is None:
        yield "`adapter: lora`"
        if config.training.optimizer.type != "adafactor":
            yield "`training.optimizer: adafactor`"
    elif config.model.quantize is None:
        yield "`model.quantize: nf4`"
    yield "a lower `data.max_length`"


def _estimate(run: PlannedRun, policy: Policy, batches: Batches) -> MemoryEstimate:
    """Estimate a run's memory by its largest micro-batch, found among its first steps and its longest pair."""
    session, plan, sizes = run.session, run.steps, batches.pairs.sizes
    accelerator = session.accelerator
    planned = plan.steps(batches.cut, 0, accelerator.process_index, accelerator.num_processes)
    steps = list(itertools.islice(planned, STEPS_LOOKED_AT))
    cuts = [cut for step in steps for cut in step.micro_batches]
    cuts.append(MicroBatch((int(plan.indices[sizes.longest[plan.indices].argmax()]),)))
    on_paper = dataclasses.replace(batches, device=torch.device("cpu"))
    candidates = [on_paper(cut) for cut in largest(sizes, cuts, batches.layout.tokens)]
    recomputed = session.config.training.gradient_checkpointing
    try:
        activations = max(
            activation_bytes(policy, batches.layout, batch, session.precision.dtype, recomputed=recomputed)
            for batch in candidates
        )
    except REFUSALS:
        # What this model computes depends on the values, which are not there.
        activations = None
    computing = session.precision.dtype, accelerator.device.type
    collisions = session.config.objective.wpo
    return dataclasses.replace(
        _without_passes(session, policy, run.reference, run.program_bytes),
        activations=activations or 0,
        counted=activations is not None,
        logits=max(logits_bytes(policy.model, batch, *computing, collisions=collisions) for batch in candidates),
        several=any(len(step.micro_batches) > 1 for step in steps),
    )


def settling_scores(session: Session, pairs: PreparedPairs) -> Settle:
    """Return what settles how pairs go through models none of which takes a gradient."""

    def settle(policy: Policy, layout: Layout) -> tuple[Batches, Mapping[str, str]]:
        return without_gradient(Batches(pairs, layout, wanted_tokens(session), session.accelerator.device)), {}

    return settle


def without_gradient(batches: Batches) -> Batches:
    """Return the same with twice the tokens, for passes that keep no activations."""
    return dataclasses.replace(batches, micro_batch_tokens=2 * batches.micro_batch_tokens)
