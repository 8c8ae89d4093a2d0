"""How pairs go through the model, settled before step 1: their layout, and the tokens of one forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from transformers import PreTrainedModel

from dpo_cli.config import Config
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch, Plan, largest
from dpo_cli.errors import UserError
from dpo_cli.modeling.allocator import keep_freed_memory, take_over_weights
from dpo_cli.modeling.attention import CannotPack
from dpo_cli.modeling.batch import Batches, PairBatch
from dpo_cli.modeling.layouts import LAYOUTS, PACKED, PADDED, Layout
from dpo_cli.modeling.memory import MemoryEstimate, activation_bytes, free_bytes, logits_bytes
from dpo_cli.modeling.pace import enough_tokens
from dpo_cli.modeling.proof import REFUSALS, prove
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.pipeline.memory import without_passes
from dpo_cli.pipeline.setup import RunData
from dpo_cli.reporting.console import Console, gib
from dpo_cli.training.checks import check_logps

SHARE_OF_FREE = 0.8
"""How much of the free memory `micro_batch_tokens: auto` lets a run take."""

_FEWEST_TOKENS = 64
STEPS_LOOKED_AT = 500
"""Steps of a run that are looked at for what its forward passes take."""


def settle_passes(
    config: Config,
    models: Sequence[PreTrainedModel],
    data: RunData,
    plan: Plan,
    accelerator: Accelerator,
    program_bytes: int,
    console: Console,
    resumed: int | None,
) -> tuple[Config, Batches]:
    """Settle layout, tokens and memory of the forward passes of a run.

    Args:
        config: Asks for them, or leaves the choice.
        models: The policy, and the reference where it is another model; they are left prepared.
        data: The run's pairs.
        plan: The run's steps.
        accelerator: Knows device, precision and ranks.
        program_bytes: What the process held before the model was loaded.
        console: Is told what was found.
        resumed: The tokens of a pass that a run to be resumed began with, or None.

    Returns:
        The configuration in which the tokens are settled, and the batches.
    """
    policy = models[0]

    def settle(layout: Layout) -> tuple[Batches, MemoryEstimate]:
        return settle_tokens(config, policy, data.pairs, layout, plan, accelerator, program_bytes, console, resumed)

    # Memory is settled before the proof, which is the first to take much of it.
    likely = expected_layout(config, policy, data.pairs, accelerator)
    batches, memory = settle(likely)
    if accelerator.device.type == "cpu":
        if memory.activations > memory.weights + memory.optimizer:
            # Then gaps of the size of the gradients are a small price for the time.
            keep_freed_memory(memory.peak - memory.program)
        take_over_weights(policy)
    scored = np.concatenate([data.train, data.held_out])
    layout = choose_layout(config, models, data.pairs, scored, accelerator, console, trained=True)
    if layout is not likely:
        batches, memory = settle(layout)
    console.facts(_facts(batches, memory))
    return with_tokens(config, batches.micro_batch_tokens), batches


def choose_layout(
    config: Config,
    models: Sequence[PreTrainedModel],
    pairs: PreparedPairs,
    indices: NDArray[np.int64],
    accelerator: Accelerator,
    console: Console,
    *,
    trained: bool,
) -> Layout:
    """Prove the layout on pairs of the run where it needs a proof; with `auto`, take the padded one where that fails.

    The longest and the two shortest are compared token by token; the gradient on the shortest, since nothing is
    known of the memory yet.

    Args:
        config: Asks for a layout, or leaves the choice.
        models: All models that will read the pairs; they are left prepared for the layout.
        pairs: The pairs of the run.
        indices: Which of them are trained on, or scored.
        accelerator: Knows precision and ranks.
        console: Is told what was found.
        trained: Whether gradients matter.

    Raises:
        UserError: The layout was asked for by name and is not exact.
    """
    layout = LAYOUTS.get(config.training.layout, PACKED)
    if not layout.needs_proof:
        return layout
    lengths = pairs.sizes.longest[indices]
    longest, shortest = indices[lengths.argmax()], indices[lengths.argsort(kind="stable")[:2]]
    learnt = list(shortest) if trained else []
    seen = [index for index in dict.fromkeys([longest, *shortest]) if index not in learnt]
    before = [model.config._attn_implementation for model in models]
    found = ""
    for model in models:
        proof = prove(model, layout, [pairs[i] for i in seen], [pairs[i] for i in learnt], accelerator.autocast)
        # All ranks take the same layout, so the one that fails decides.
        found = next(filter(None, gather_object([proof.fails(accelerator.mixed_precision)])), "")
        if found:
            found = f"{type(model).__name__}: {found}"
            break
        nats, share = f"{proof.difference:.1g} nats a token", f"; its gradient's norm by {proof.norm_difference:.1g}"
        console.notice(f"checked: {layout.name} gives what {PADDED.name} gives, up to {nats}{share if learnt else ''}")
    if not found:
        return layout
    for model, attention in zip(models, before, strict=True):
        model.set_attn_implementation(attention)
    if config.training.layout in LAYOUTS:
        raise _inexact(layout, found)
    console.warning(f"using the padded layout, since the {layout.name} one is not exact with this model ({found})")
    return PADDED


def _inexact(layout: Layout, found: str) -> UserError:
    what = f"the {layout.name} layout is not exact with this model ({found})"
    return UserError(what, f"`training.layout: {layout.name}`", "set `training.layout: auto` or `padded`")


def expected_layout(config: Config, model: PreTrainedModel, pairs: PreparedPairs, accelerator: Accelerator) -> Layout:
    """Return the layout that a run will take unless its proof fails, without the model's weights.

    Raises:
        UserError: The layout was asked for by name and the model refuses it.
    """
    layout = LAYOUTS.get(config.training.layout, PACKED)
    if not layout.needs_proof:
        return layout
    with contextlib.suppress(*(kind for kind in REFUSALS if kind is not CannotPack)):
        try:
            activation_bytes(model, layout, layout.batch([0], [pairs[0]]), compute_dtype(accelerator), recomputed=False)
        except CannotPack as refusal:
            if config.training.layout in LAYOUTS:
                raise _inexact(layout, f"{type(model).__name__}: {refusal}") from None
            return PADDED
    return layout


def settle_tokens(
    config: Config,
    model: PreTrainedModel,
    pairs: PreparedPairs,
    layout: Layout,
    plan: Plan,
    accelerator: Accelerator,
    program_bytes: int,
    console: Console,
    resumed: int | None = None,
) -> tuple[Batches, MemoryEstimate]:
    """Settle how many tokens a forward pass has, and tell what the run then takes in memory.

    `auto` is as many as still gain speed on this machine, halved until the run fits into `SHARE_OF_FREE` of the
    memory that is free.

    Args:
        config: Asks for a number, or for `auto`.
        model: The policy; its weights may be missing.
        pairs: The run's pairs.
        layout: How they are laid out.
        plan: The run's steps.
        accelerator: Knows device and precision.
        program_bytes: What the process held before the model was loaded.
        console: Is told where the memory will not do.
        resumed: The number that a run to be resumed began with, or None.

    Returns:
        The batches under that number, the same on all ranks, and the estimate.
    """
    device = accelerator.device

    def with_budget(num_tokens: int) -> tuple[Batches, MemoryEstimate]:
        batches = Batches(pairs, layout, num_tokens, device)
        return batches, estimate(config, model, batches, plan, accelerator, program_bytes)

    if config.training.micro_batch_tokens != "auto":
        return with_budget(config.training.micro_batch_tokens)
    if resumed:
        return with_budget(resumed)
    batches, found = with_budget(wanted_tokens(config, accelerator))
    free = free_bytes(device) + sum(p.nbytes for p in model.parameters() if not p.is_meta)
    if device.type == "cpu":
        free //= accelerator.num_processes
    while found.peak - found.program > SHARE_OF_FREE * free and batches.micro_batch_tokens > _FEWEST_TOKENS:
        fewer, smaller = with_budget(batches.micro_batch_tokens // 2)
        if smaller.peak >= found.peak:
            break
        batches, found = fewer, smaller
    if found.peak - found.program > free:
        hint = "try `training.gradient_checkpointing: true`, `training.optimizer: adafactor`, a lower `data.max_length`"
        console.warning(f"the run takes about {found.peak / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; {hint}")
    fewest = min(gather_object([batches.micro_batch_tokens]))
    return (batches, found) if fewest == batches.micro_batch_tokens else with_budget(fewest)


def prove_logps(model: PreTrainedModel, batches: Batches, indices: NDArray[np.int64], accelerator: Accelerator) -> str:
    """Prove, before hours go into many pairs, that a model's log-probabilities are its own; return a line that says so.

    Raises:
        UserError: They are not, or not finite.
    """
    return check_logps(Scorer(model), shortest_pair(batches, indices), accelerator)


def shortest_pair(batches: Batches, indices: NDArray[np.int64]) -> PairBatch:
    """Return the shortest of some pairs: what holds of all of them is proved on it in the least time."""
    return batches(MicroBatch((int(indices[batches.pairs.sizes.longest[indices].argmin()]),)))


def wanted_tokens(config: Config, accelerator: Accelerator) -> int:
    """Return the tokens of a forward pass that are asked for; `auto`: as many as still gain speed."""
    asked = config.training.micro_batch_tokens
    return enough_tokens(accelerator.device) if asked == "auto" else asked


def estimate(
    config: Config,
    model: PreTrainedModel,
    batches: Batches,
    plan: Plan,
    accelerator: Accelerator,
    program_bytes: int,
) -> MemoryEstimate:
    """Estimate a run's memory by its largest micro-batch, found among its first steps and its longest pair."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    steps = list(itertools.islice(plan.steps(batches.cut, 0, rank, num_ranks), STEPS_LOOKED_AT))
    cuts = [cut for step in steps for cut in step.micro_batches]
    sizes = batches.pairs.sizes
    cuts.append(MicroBatch((int(plan.indices[sizes.longest[plan.indices].argmax()]),)))
    on_paper = dataclasses.replace(batches, device=torch.device("cpu"))
    candidates = [on_paper(cut) for cut in largest(sizes, cuts, batches.layout.tokens)]
    recomputed, dtype = config.training.gradient_checkpointing, compute_dtype(accelerator)
    try:
        activations = max(
            activation_bytes(model, batches.layout, batch, dtype, recomputed=recomputed) for batch in candidates
        )
    except REFUSALS:
        # What this model computes depends on the values, which are not there.
        activations = None
    return dataclasses.replace(
        without_passes(config, model, accelerator, program_bytes),
        activations=activations or 0,
        counted=activations is not None,
        logits=max(logits_bytes(model, batch, collisions=config.objective.wpo) for batch in candidates),
        several=any(len(step.micro_batches) > 1 for step in steps),
    )


def _facts(batches: Batches, memory: MemoryEstimate) -> dict[str, str]:
    """Say how pairs go through the model, and what that takes in memory at the peak."""
    activations = f"{gib(memory.activations)} of it activations"
    if not memory.counted:
        activations = "and activations, which could not be counted beforehand"
    return {
        "micro-batch": f"at most {batches.micro_batch_tokens:,} tokens, or one pair; {batches.layout.name}",
        "memory": f"about {gib(memory.peak)} at the peak, {activations}",
    }


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return what is computed in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]


def without_gradient(batches: Batches) -> Batches:
    """Return the same with twice the tokens, for passes that keep no activations."""
    return dataclasses.replace(batches, micro_batch_tokens=2 * batches.micro_batch_tokens)


def with_tokens(config: Config, num_tokens: int) -> Config:
    """Return a configuration in which the tokens of a forward pass are settled."""
    training = config.training.model_copy(update={"micro_batch_tokens": num_tokens})
    return config.model_copy(update={"training": training})
