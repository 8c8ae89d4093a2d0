"""What a run takes in memory: whether it fits at all, and how many tokens a forward pass may have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch, largest
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.held import Split
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.measured_passes import PassBytes
from dpo_cli.modeling.memory import MemoryEstimate, activation_bytes, free_bytes, logits_bytes
from dpo_cli.modeling.pace import enough_tokens
from dpo_cli.modeling.planned_sizes import lora_weights, sizes_under_lora
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.proof import REFUSALS
from dpo_cli.modeling.sizes import Sizes
from dpo_cli.pipeline.fitting import Needed, refusal
from dpo_cli.pipeline.models import Settle, trained_policy
from dpo_cli.pipeline.out_of_memory import advice
from dpo_cli.pipeline.session import Session
from dpo_cli.reporting.console import gib

if TYPE_CHECKING:
    from dpo_cli.pipeline.plan import PlannedRun

SHARE_OF_FREE = 0.8
"""How much of the free memory `micro_batch_tokens: auto` lets a run take."""

_GAPS_BESIDE_ADAPTER = 0.65
"""What gaps between tensors take beside an adapter where freed memory is kept, as a share of the activations."""

_PLENTY = 0.5
"""Up to which share of the free memory a run beside an adapter may take with gaps."""

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

    def needed(changed: Session) -> MemoryEstimate:
        sizes, trained = _planned(session, policy, changed)
        memory = _without_passes(changed, sizes, trained, reference, program_bytes)
        return dataclasses.replace(memory, program=0)

    _refuse_what_cannot_fit(session, policy, needed, _free(session))


def _planned(session: Session, policy: Policy, changed: Session) -> tuple[Sizes, Sequence[Tensor]]:
    """Return what a process has of the policy under other settings, and what then trains.

    Args:
        session: What the policy is for.
        policy: It, maybe without weights.
        changed: The session under the other settings.
    """
    adapter = changed.config.adapter
    if session.config.adapter is None and isinstance(adapter, Lora):
        dtype, quantized = changed.held_beside.torch_dtype, changed.config.model.quantize is not None
        added = lora_weights(policy.model, adapter).values()
        sizes = sizes_under_lora(policy.model, adapter, dtype, quantized=quantized, shards=changed.shards)
        return sizes, list(itertools.chain.from_iterable(added))
    model = _under(session, policy, changed)
    return model.sizes(changed.shards), model.weights.trained()


def _under(session: Session, policy: Policy, changed: Session) -> Policy:
    """Return the policy of a session under other settings, without weights where it is another one."""
    same = (changed.config.adapter, changed.held) == (session.config.adapter, session.held)
    return policy if same else trained_policy(changed, empty=True)


def _refuse_what_cannot_fit(
    session: Session, policy: Policy, needed: Needed, free: int, further: Sequence[str] = ()
) -> None:
    """Refuse a run that does not fit into memory.

    Args:
        session: Says what is asked for.
        policy: The policy; its weights may be missing.
        needed: Estimates what a run takes at least.
        free: The memory that is free for each process, in bytes.
        further: What else takes less memory, in words.

    Raises:
        UserError: It does not fit; it names the parts, and what would fit.
    """
    if not all(session.of_all(needed(session).peak <= free)):
        others = [*further, *(["fewer processes"] if _sharing(session) > 1 else [])]
        raise refusal(session, needed, free, policy.sizes().numbers, others)


def _free(session: Session, present: int = 0) -> int:
    """Return the memory that is free for each process, in bytes, the least of all.

    Args:
        session: Knows the devices and the processes.
        present: What is held already and counted with what is needed.
    """
    if session.assumed:
        return session.assumed.memory
    return min(session.of_all(free_bytes(session.accelerator.device) + present)) // _sharing(session)


def _sharing(session: Session) -> int:
    """Return how many processes share the memory that is free: on a CPU all of them."""
    return session.accelerator.num_processes if session.accelerator.device.type == "cpu" else 1


def _without_passes(
    session: Session, sizes: Sizes, trained: Sequence[Tensor], reference: Policy, program_bytes: int
) -> MemoryEstimate:
    """Estimate what a run takes whatever its pairs are: without activations and logits.

    Args:
        session: Says what is held beside the weights.
        sizes: Those of the policy.
        trained: What the optimizer steps on, whole; it may have no content.
        reference: The reference, asked only where it is another model than the policy.
        program_bytes: What the process holds already.
    """
    config, on_cpu, shards = session.config, session.accelerator.device.type == "cpu", session.shards
    stepped = [shards.part(weights) for weights in trained] if shards else trained
    state = 0 if config.training.offload else config.training.optimizer.state_bytes(stepped)
    saved = sizes.saved + state + (sizes.saved if config.reference.type == "synced" else 0)
    return MemoryEstimate(
        program=program_bytes if on_cpu else 0,
        weights=sizes.held,
        reference=_reference_bytes(session, sizes, reference),
        optimizer=state,
        gradients=sizes.trained,
        exchanged=_exchanged_bytes(session, sizes),
        gathered=sizes.gathered,
        activations=0,
        counted=False,
        logits=0,
        copy=saved if on_cpu and config.checkpoints.background else 0,
        several=False,
    )


def _exchanged_bytes(session: Session, sizes: Sizes) -> int:
    """Return what averaging gradients over processes takes beside them: buckets, unless it is done where they are."""
    held = session.held
    in_place = isinstance(held, Split) and held.gradients != held.dtype
    whole = session.accelerator.num_processes > 1 and session.shards is None
    return sizes.trained if whole and not in_place else 0


def _reference_bytes(session: Session, policy: Sizes, reference: Policy) -> int:
    """Return what the reference holds beside a policy: of one that shares its weights, what is not shared."""
    config = session.config
    if not config.reference.holds_model:
        return 0
    if config.reference.model:
        return reference.sizes(session.shards).held
    # One that moves has weights of its own also where switching an adapter off would answer as before step 1.
    return policy.beginning or (policy.saved if config.reference.type == "synced" else 0)


def settle_tokens(
    run: PlannedRun,
    policy: Policy,
    batches: Batches,
    resumed: int | None = None,
    passes: PassBytes | None = None,
) -> tuple[Batches, MemoryEstimate]:
    """Settle how many tokens a forward pass has, and estimate what the run then takes in memory.

    `auto` is as many as still gain speed on this machine, halved until the run fits into `SHARE_OF_FREE` of the
    memory that is free.

    Args:
        run: Its session asks for a number, or for `auto`, and is told where the memory will not do.
        policy: The policy; its weights may be missing.
        batches: The pairs in their layout; how many tokens a pass has is replaced.
        resumed: The number that a run to be resumed began with, or None.
        passes: What passes were measured to take, or None.

    Returns:
        The batches under that number, the same in all processes, and the estimate.

    Raises:
        UserError: There is too little memory for passes of one pair each; it names the parts, and what would fit.
    """
    session = run.session

    def with_budget(num_tokens: int) -> tuple[Batches, MemoryEstimate]:
        cut = dataclasses.replace(batches, micro_batch_tokens=num_tokens)
        return cut, _estimate(run, policy, cut, passes)

    asked = resumed if session.config.training.micro_batch_tokens == "auto" else wanted_tokens(session)
    settled, memory = with_budget(asked or wanted_tokens(session))
    free = _free(session, policy.sizes().present)
    while not asked and memory.needed > SHARE_OF_FREE * free and settled.micro_batch_tokens > _FEWEST_TOKENS:
        fewer, smaller = with_budget(_next_budget(run, settled))
        if smaller.peak >= memory.peak:
            break
        settled, memory = fewer, smaller
    if not all(session.of_all(memory.needed <= free)):
        _check_least(run, batches, free)
        what = f"the run takes about {gib(memory.needed)}, and {gib(free)} of memory are free"
        session.console.warning(f"{what}; try {', '.join(advice(session.config))}")
    fewest = min(session.of_all(settled.micro_batch_tokens))
    if fewest != settled.micro_batch_tokens:
        settled, memory = with_budget(fewest)
    return settled, _kept_or_returned(session, memory, free)


def _next_budget(run: PlannedRun, batches: Batches) -> int:
    """Return half the tokens of a forward pass, halved until the largest one is cut, where it has several pairs."""
    largest, budget = largest_micro_batch(run, batches), batches.micro_batch_tokens // 2
    num_tokens = batches.layout.tokens(batches.pairs.sizes, largest.pairs)
    while len(largest.pairs) > 1 and budget >= num_tokens:
        budget //= 2
    return budget


def _kept_or_returned(session: Session, memory: MemoryEstimate, free: int) -> MemoryEstimate:
    """Settle whether a CPU keeps what is freed for the next pass, and count the gaps that this leaves.

    It does where most of the memory is activations, which are freed and taken again at every pass. Of a run of all
    weights, gradients and moments fill the gaps; beside an adapter nothing does, so that there has to be plenty.

    Args:
        session: Says what trains, and on which device.
        memory: What the run takes where everything is returned.
        free: The memory that is free were no weights loaded.
    """
    if session.accelerator.device.type != "cpu" or memory.activations <= memory.weights + memory.optimizer:
        return memory
    if session.config.adapter is None:
        return dataclasses.replace(memory, keeps_freed=True)
    kept = dataclasses.replace(memory, keeps_freed=True, gaps=int(_GAPS_BESIDE_ADAPTER * memory.activations))
    return kept if kept.needed < _PLENTY * free else memory


def _check_least(run: PlannedRun, batches: Batches, free: int) -> None:
    """Refuse a run that does not fit into memory however few tokens a forward pass has.

    Args:
        run: The run; what its policy and its reference hold is told by their sketches.
        batches: Its pairs in their layout.
        free: The memory that is free, in bytes, were no weights loaded.

    Raises:
        UserError: It does not fit; it names the parts, and what would fit.
    """
    cut = dataclasses.replace(batches, micro_batch_tokens=_FEWEST_TOKENS)

    # What passes take does not depend on how many processes there are, and is slow to count.
    passes: dict[str, MemoryEstimate] = {}

    def needed(changed: Session) -> MemoryEstimate:
        policy = _under(run.session, run.sketch, changed)
        reference = run.reference if changed.config.reference.model else policy
        recomputed, sharded = changed.config.training.gradient_checkpointing, changed.shards is not None
        key = f"{changed.config.adapter!r} {changed.held!r} {recomputed} {sharded}"
        if key not in passes:
            tried = dataclasses.replace(run, session=changed, sketch=policy, reference=reference, program_bytes=0)
            passes[key] = _estimate(tried, policy, cut)
        held = _without_passes(changed, policy.sizes(changed.shards), policy.weights.trained(), reference, 0)
        names = ("activations", "logits", "counted", "several")
        return dataclasses.replace(held, **{name: getattr(passes[key], name) for name in names})

    _refuse_what_cannot_fit(run.session, run.sketch, needed, free, ["a lower `data.max_length`"])


def wanted_tokens(session: Session) -> int:
    """Return the tokens of a forward pass that are asked for; `auto`: as many as still gain speed."""
    asked = session.config.training.micro_batch_tokens
    return enough_tokens(session.accelerator.device) if asked == "auto" else asked


def _estimate(run: PlannedRun, policy: Policy, batches: Batches, passes: PassBytes | None = None) -> MemoryEstimate:
    """Estimate a run's memory by its largest micro-batches: as `passes` were measured, or counted on paper."""
    session = run.session
    cuts, several = _cuts(run, batches)
    candidates = largest(batches.pairs.sizes, cuts, batches.layout.tokens)
    weights = policy.sizes(session.shards), policy.weights.trained()
    memory = _without_passes(session, *weights, run.reference, run.program_bytes)
    memory = dataclasses.replace(memory, several=several)
    if passes:
        sizes = [batches.layout.tokens(batches.pairs.sizes, cut.pairs) for cut in candidates]
        return dataclasses.replace(memory, activations=passes.of(max(sizes)), counted=True)
    on_paper = dataclasses.replace(batches, device=torch.device("cpu"))
    laid_out = [on_paper(cut) for cut in candidates]
    dtype, gathered = session.precision.dtype, session.shards is not None and session.held.gathered_as() is not None
    how = {"recomputed": session.config.training.gradient_checkpointing, "gathered": gathered}
    try:
        activations = max(activation_bytes(policy, batches.layout, batch, dtype, **how) for batch in laid_out)
    except REFUSALS:
        # What this model computes depends on the values, which are not there.
        activations = None
    device, whole = session.accelerator.device.type, {"collisions": session.config.objective.wpo, "gathered": gathered}
    logits = max(logits_bytes(policy.model, batch, dtype, device, **whole) for batch in laid_out)
    return dataclasses.replace(memory, activations=activations or 0, counted=activations is not None, logits=logits)


def _cuts(run: PlannedRun, batches: Batches) -> tuple[list[MicroBatch], bool]:
    """Return the micro-batches of a run's first steps and its longest pair, and whether a step has several."""
    plan = run.steps
    planned = plan.steps(batches.cut, 0, *data_rank(run.session.accelerator))
    steps = list(itertools.islice(planned, STEPS_LOOKED_AT))
    longest = plan.indices[batches.pairs.sizes.longest[plan.indices].argmax()]
    cuts = [cut for step in steps for cut in step.micro_batches] + [MicroBatch((int(longest),))]
    return cuts, any(len(step.micro_batches) > 1 for step in steps)


def largest_micro_batch(run: PlannedRun, batches: Batches) -> MicroBatch:
    """Return the micro-batch of a run's first steps, or its longest pair, that has the most tokens."""
    sizes, count = batches.pairs.sizes, batches.layout.tokens
    return max(_cuts(run, batches)[0], key=lambda cut: count(sizes, cut.pairs))


def settling_scores(session: Session, pairs: PreparedPairs) -> Settle:
    """Return what settles how pairs go through models none of which takes a gradient."""

    def settle(policy: Policy, layout: Layout) -> tuple[Batches, Mapping[str, str]]:
        return without_gradient(Batches(pairs, layout, wanted_tokens(session), session.accelerator.device)), {}

    return settle


def without_gradient(batches: Batches) -> Batches:
    """Return the same with twice the tokens, for passes that keep no activations."""
    return dataclasses.replace(batches, micro_batch_tokens=2 * batches.micro_batch_tokens)
