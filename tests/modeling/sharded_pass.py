"""Four processes that share a model's weights: each counts what it holds, beside what was estimated.

A program, so that what it imports is imported once: it is forked before torch has any thread. Given are a folder and
the settings of each case as JSON; every process writes what it has counted into the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import build
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.folders.loading import load_onto_shards
from dpo_cli.modeling.folders.model_files import NO_TRUST
from dpo_cli.modeling.held import QUANTIZED, Held, Split, held_as
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.memory import MemoryEstimate, activation_bytes, logits_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import Scorer, recompute_activations
from dpo_cli.modeling.sharded_sizes import Sharding
from dpo_cli.modeling.shards import spread
from dpo_cli.modeling.trained import Trained, Whole
from dpo_cli.training.optimizer import AdamW

SIZES = {"hidden_size": 128, "intermediate_size": 341, "num_hidden_layers": 6, "head_dim": 32, "vocab_size": 1001}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
RANKS = 4
PACKED = LAYOUTS["packed"]
HALVES = Split(gradients="bfloat16", low_on_host=True)
"""What a GPU alone holds least of, which shards know nothing of."""


def pairs_of_rank(rank: int) -> PairBatch:
    """Lay out pairs of the same lengths on every rank."""
    generator = np.random.default_rng(rank)
    tokens = [[generator.integers(3, 300, size).astype(np.int32) for size in (9, 14, 11)] for _ in range(4)]
    return PACKED.batch(range(4), [TokenizedPair(*each, origin=f"f:{i}") for i, each in enumerate(tokens)])


def held_in(case: dict[str, Any]) -> Held:
    """Return how a case holds its weights."""
    if case["held"] == "split":
        return HALVES
    return held_as(case["held"], case["computed"] if case["held"] in QUANTIZED else case["held"])


def policy_of(case: dict[str, Any], *, on_shards: bool = False) -> Policy:
    """Build a policy with random weights, held as they are asked for or as the processes share them."""
    held = held_in(case).on_shards() if on_shards else held_in(case)
    model = build("llama", **SIZES, **HEADS, tie_word_embeddings=case["tied"])
    if held.quantized:
        model = Policy(model, held=held).sketched(model.config).model
        held.lay_out(model)
    else:
        model.to(held.torch_dtype)
    return Policy(model, trained_in(case), held)


def trained_in(case: dict[str, Any]) -> Trained:
    """Return what trains in a case."""
    return Adapted(Lora(rank=5)) if case["adapter"] else Whole()


def spread_policy(case: dict[str, Any], mesh: DeviceMesh, folder: Path) -> tuple[Policy, Scorer]:
    """Return a policy that is sharded, and what answers for it, loaded from a folder."""
    held, made = held_in(case), []

    def lay_out(model: PreTrainedModel) -> Callable[[str], str | None]:
        policy = Policy(model, trained_in(case), held.on_shards())
        made.append((policy, Scorer(model)))
        spread(made[0][1], mesh, torch.device("cpu"), held.gathered_as())
        return policy.weights.own_name()

    if distributed.get_rank() == 0:
        build("llama", **SIZES, **HEADS, tie_word_embeddings=case["tied"]).save_pretrained(folder)
    distributed.barrier()
    load_onto_shards(str(folder), NO_TRUST, held.on_shards(), lay_out)
    distributed.barrier()
    return made[0]


def largest(work: Callable[[], None]) -> int:
    """Do some work; return the most bytes that it held beyond those held before.

    Gloo's threads let go of buffers whenever they come to it, which makes some passes hold more than others.
    """
    return min(_largest_once(work) for _ in range(2))


def _largest_once(work: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def storages(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the memory that tensors of this rank are in."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def scales_of(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return what sharded layers of few bits keep beside these."""
    states = [layer.kept.state for layer in model.modules() if hasattr(layer, "kept")]
    return [
        tensor
        for state in states
        for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]


def estimated(case: dict[str, Any], shards: Sharding, dtype: torch.dtype) -> MemoryEstimate:
    """Estimate what a rank holds; all have as many tokens, and one rank alone takes the seconds that it costs."""
    estimates = [_estimated(case, shards, dtype) if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(estimates)
    assert estimates[0] is not None
    return estimates[0]


def _estimated(case: dict[str, Any], shards: Sharding, dtype: torch.dtype) -> MemoryEstimate:
    policy, batch, recomputed = policy_of(case), pairs_of_rank(0), case["recomputed"]
    gathered = policy._held.gathered_as() is not None
    sizes, parts = policy.sizes(shards), [shards.part(weights) for weights in policy.weights.trained()]
    how = {"gathered": gathered, "recomputed": recomputed}
    return MemoryEstimate(
        program=0,
        weights=sizes.held,
        reference=0,
        optimizer=AdamW().state_bytes(parts),
        gradients=sizes.trained,
        activations=activation_bytes(policy, PACKED, batch, dtype, **how),
        logits=logits_bytes(policy.model, batch, dtype, "cpu", gathered=gathered),
        gathered=sizes.gathered,
        copy=0,
        counted=True,
        several=True,
    )


def counted(case: dict[str, Any], mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Take steps of a sharded model; return what was estimated and what was there."""
    dtype, batch = getattr(torch, case["computed"]), pairs_of_rank(distributed.get_rank())
    estimate = estimated(case, Sharding(mesh.size()), dtype)
    policy, scorer = spread_policy(case, mesh, folder)
    policy.read(PACKED)
    if case["recomputed"]:
        recompute_activations(policy.model)
    trained = policy.weights.trained()
    optimizer = AdamW().over(trained, 1e-4, 0.0)

    def add_gradients() -> None:
        with policy.weights.training_pass():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logps = scorer(batch)
            logps.float().sum().backward()

    add_gradients()
    optimizer.step()
    weights = storages([weights.to_local() for weights in policy.model.parameters()] + scales_of(policy.model))
    gradients = storages([weights.grad.to_local() for weights in trained])
    moments = [moment.to_local() for state in optimizer.state.values() for moment in state.values() if moment.ndim]
    held = {"weights": weights, "gradients": gradients, "optimizer": storages(moments)}

    def add_first_gradients() -> None:
        optimizer.zero_grad()
        add_gradients()

    again = largest(add_gradients)
    # What the gradients held, and is let go first, has to be held again.
    first = largest(add_first_gradients)
    return {
        "first_peak": sum(held.values()) + first,
        "estimated_first_peak": dataclasses.replace(estimate, several=False).peak,
        "held": held,
        "peak": sum(held.values()) + again,
        "estimate": {"weights": estimate.weights, "gradients": estimate.gradients, "optimizer": estimate.optimizer},
        "estimated_peak": estimate.peak,
        "parts": estimate.parts(),
        "whole": policy_of(case, on_shards=True).sizes().held if distributed.get_rank() == 0 else None,
    }


def count_on(rank: int, folder: Path, cases: list[dict[str, Any]]) -> None:
    """Count every case on a rank, and write it."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = []
    for number, case in enumerate(cases):
        shape = (RANKS // case["shards"], case["shards"])
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))["shard"]
        found.append(counted(case, mesh, folder / f"model {number}"))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def main(folder: str, cases: str) -> int:
    """Count on every rank; return the first exit status that is not 0."""
    ranks = []
    for rank in range(RANKS):
        if pid := os.fork():
            ranks.append(pid)
            continue
        count_on(rank, Path(folder), json.loads(cases))
        return 0
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
