"""How a run's pairs go through the model: tokens of a forward pass, memory of each, smaller passes where it ends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from dpo_cli.modeling.allocator import keep_freed_memory, take_over_weights
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.measured_passes import cuda_peak, measured_passes
from dpo_cli.modeling.memory import MemoryEstimate, free_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.memory import largest_micro_batch, settle_tokens, wanted_tokens
from dpo_cli.pipeline.models import Settle, expected_layout
from dpo_cli.pipeline.out_of_memory import during
from dpo_cli.pipeline.plan import PlannedRun
from dpo_cli.pipeline.session import Session
from dpo_cli.reporting.console import gib
from dpo_cli.system.text import several
from dpo_cli.training.recuts import Recuts, read_recuts, write_recuts


def settled_on_paper(plan: PlannedRun, *, resume: bool) -> tuple[Batches, MemoryEstimate]:
    """Settle how pairs go through the model, and what that takes in memory, before any weight is read.

    Raises:
        UserError: It cannot fit into memory.
    """
    session, pairs = plan.session, plan.data.pairs
    batches = Batches(pairs, expected_layout(session, plan.sketch, pairs), 1, session.accelerator.device)
    return settle_tokens(plan, plan.sketch, batches, _resumed_tokens(plan, resume=resume))


def settling(plan: PlannedRun, settled: tuple[Batches, MemoryEstimate], *, resume: bool) -> Settle:
    """Return what settles the forward passes of a run under the layout that it takes in the end.

    Args:
        plan: The run.
        settled: The batches under the layout that was expected, and what the run then takes in memory.
        resume: Whether it goes on from what is there.
    """
    device = plan.session.accelerator.device

    def settle(policy: Policy, layout: Layout) -> tuple[Batches, Mapping[str, str]]:
        batches, memory = settled
        if layout != batches.layout:
            other = dataclasses.replace(batches, layout=layout)
            batches, memory = settle_tokens(plan, policy, other, _resumed_tokens(plan, resume=resume))
        if device.type == "cpu":
            if memory.keeps_freed:
                keep_freed_memory(memory.needed)
            take_over_weights(policy.model)
        return batches, _described(batches, memory)

    return settle


def measured(plan: PlannedRun, policy: Policy, batches: Batches, *, resume: bool) -> Batches:
    """Cut pairs anew by what passes really take, on a device that counts its memory and where `auto` asks for it.

    Args:
        plan: The run.
        policy: The policy, placed, as it is trained.
        batches: How its pairs go through it by what was counted on paper.
        resume: Whether the run goes on from what is there: then its passes are those that it began with.
    """
    session = plan.session
    wanted = session.config.training.micro_batch_tokens == "auto" and not _resumed_tokens(plan, resume=resume)
    if session.accelerator.device.type != "cuda" or not wanted:
        return batches
    most = dataclasses.replace(batches, micro_batch_tokens=wanted_tokens(session))
    with during("while passes were measured"):
        room = functools.partial(_have_room, session) if policy.placement.is_sharded else None
        passes = measured_passes(policy, most, functools.partial(largest_micro_batch, plan), cuda_peak, room)
    batches, memory = settle_tokens(plan, policy, batches, passes=passes)
    session.console.facts({f"measured {name}": said for name, said in _described(batches, memory).items()})
    return batches


def _have_room(session: Session, num_bytes: int) -> bool:
    """Tell whether the devices of all processes have as much memory as each of them asks for."""
    return all(session.of_all(num_bytes <= free_bytes(session.accelerator.device)))


def recuts_of(plan: PlannedRun, *, resume: bool) -> Recuts:
    """Return what cuts a step again where memory runs out in it, and keeps that in the run's folder.

    Of several processes, no step is cut again in the midst of which they wait for each other: where weights are split
    among them, or passes look at the whole step before they take a gradient.
    """
    folder, console, config = plan.folder, plan.session.console, plan.session.config
    looks_first = config.objective.compares_pairs or config.objective.router_aux > 0
    waits = plan.session.accelerator.num_processes > 1 and (plan.session.placement.is_sharded or looks_first)
    if config.training.micro_batch_tokens != "auto" or waits:
        return Recuts()
    recuts = Recuts(allowed=True, tokens=plan.session.agreed(read_recuts(folder.recuts) if resume else {}))

    def changed(step: int, num_tokens: int) -> None:
        if plan.session.accelerator.is_main_process:
            write_recuts(folder.recuts, recuts.tokens)
        what = f"memory ran out in step {step}, which is taken again in smaller passes"
        console.warning(f"{what}; from here on a forward pass has at most {several(num_tokens, 'token')}, or one pair")

    recuts.changed = changed
    return recuts


def _resumed_tokens(plan: PlannedRun, *, resume: bool) -> int | None:
    """Return the tokens of a forward pass that a run to be resumed began with."""
    return plan.folder.recorded.count("training.micro_batch_tokens") if resume else None


def _described(batches: Batches, memory: MemoryEstimate) -> dict[str, str]:
    """Say how pairs go through the model, and what that takes in memory at the peak."""
    activations = f"{gib(memory.activations)} of it activations"
    if not memory.counted:
        activations = "and activations, which could not be estimated"
    return {
        "micro-batch": f"at most {several(batches.micro_batch_tokens, 'token')}, or one pair; {batches.layout.name}",
        "memory": f"about {gib(memory.peak)} at the peak, {activations}",
    }
