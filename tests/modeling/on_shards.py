"""What one of several processes finds of a model whose weights are sharded over them, beside one that has all of them.

It is started by torchrun, as `python -m torch.distributed.run … tests/modeling/on_shards.py MODEL CASE`; the first
process prints what it has found as a line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
from accelerate import Accelerator
from tiny_models import example_pairs
from torch import distributed

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.held import Bfloat16, Float32, Int8, Nf4, Split
from dpo_cli.modeling.layouts import PACKED
from dpo_cli.modeling.placement import placement_for
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.shards import is_sharded, local
from dpo_cli.training.optimizer import AdamW

PAIRS = example_pairs() * 2

CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "recomputed": {"recomputed": True},
    "split": {"held": Split(), "precision": "bf16"},
    "lora": {"trained": Adapted(Lora(rank=3), seed=7)},
    "lora on bfloat16": {"trained": Adapted(Lora(rank=3), seed=7), "held": Bfloat16(), "precision": "bf16"},
    "nf4": {"trained": Adapted(Lora(rank=3), seed=7), "held": Nf4()},
    "nf4 in bfloat16": {"trained": Adapted(Lora(rank=3), seed=7), "held": Nf4(dtype="bfloat16"), "precision": "bf16"},
    "nf4 recomputed": {"trained": Adapted(Lora(rank=3), seed=7), "held": Nf4(), "recomputed": True},
    "int8": {"trained": Adapted(Lora(rank=3), seed=7), "held": Int8()},
    "dora on nf4": {"trained": Adapted(Lora(rank=3, dora=True), seed=7), "held": Nf4()},
    "dora on int8": {"trained": Adapted(Lora(rank=3, dora=True), seed=7), "held": Int8()},
    "dora": {"trained": Adapted(Lora(rank=3, dora=True), seed=7)},
}


def batch(rank: int, ranks: int) -> Any:
    """Return the pairs of a rank, in one pass."""
    indices = list(range(rank, len(PAIRS), ranks))
    return PACKED.batch(indices, [PAIRS[at] for at in indices])


def ready(model: str, accelerator: Accelerator, sharding: str, case: dict[str, Any]) -> Policy:
    """Return a policy that trains, with its weights whole or split."""
    placement = placement_for(accelerator, sharding)
    how = {"trained": case.get("trained"), "held": case.get("held", Float32())}
    policy = Policy.load(model, placement=placement, **how)
    policy.weights.fingerprints  # noqa: B018 - taken before step 1
    policy.read(PACKED)
    policy.place(accelerator, trained=True, recomputed=case.get("recomputed", False))
    return policy


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; every process asks."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def answers(policy: Policy, rank: int, ranks: int) -> torch.Tensor:
    """Return log-probabilities, without gradient."""
    with torch.no_grad():
        found: torch.Tensor = policy.scorer(batch(rank, ranks))
    return found


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest magnitude."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-30))


def share(tensor: torch.Tensor, ranks: int) -> int:
    """Return the bytes of the rows that the first process has of a tensor."""
    return math.ceil(tensor.shape[0] / ranks) * tensor[:1].numel() * tensor.element_size()


def main(model: str, name: str) -> None:
    """Take a step with weights whole and split, and print what differs."""
    case = CASES[name]
    accelerator = Accelerator(cpu=True, mixed_precision=case.get("precision", "no"))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    plain, split = (ready(model, accelerator, sharding, case) for sharding in ("none", "full"))
    found: dict[str, Any] = {
        "same identity": plain.identity == split.identity,
        "answers": difference(answers(split, rank, ranks), answers(plain, rank, ranks)),
    }
    split.keep_beginning()
    before = answers(split, rank, ranks)
    for policy in (plain, split):
        with policy.adding_up(last=True):
            logps = policy.scorer(batch(rank, ranks))
            (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    pairs = list(zip(split.weights.trained(), plain.weights.trained(), strict=True))
    gradients = [(whole(ours.grad), theirs.grad) for ours, theirs in pairs]
    found["gradients"] = max(difference(*pair) for pair in gradients)
    found["same gradients"] = all(torch.equal(*pair) for pair in gradients)
    found["bytes"] = {
        "weights": sum(local(one).nbytes for one in split.model.parameters()),
        "share of weights": sum(share(one, ranks) for one in plain.model.parameters()),
        "gradients": sum(local(one.grad).nbytes for one in split.weights.trained()),
        "share of gradients": sum(share(theirs, ranks) for _, theirs in gradients),
    }
    copy = split.frozen_copy()
    copy.place(accelerator, trained=False)
    found["copy"] = difference(answers(copy, rank, ranks), before)
    found["apart from a copy"] = sorted(
        {
            ours.requires_grad
            for ours, theirs in zip(split.model.parameters(), copy.model.parameters(), strict=True)
            if local(ours).data_ptr() != local(theirs).data_ptr()
        }
    )
    norms = [float(policy.clip(0.5)) for policy in (plain, split)]
    found["norm"] = abs(norms[1] / norms[0] - 1)
    optimizers = [AdamW().over(policy.weights.trained(), 1e-3, 0.1) for policy in (plain, split)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    found["bytes"]["moments"] = sum(
        local(one).nbytes for state in optimizers[1].state.values() for one in state.values() if one.ndim
    )
    found["moved"] = difference(answers(split, rank, ranks), before)
    found["answers after"] = difference(answers(split, rank, ranks), answers(plain, rank, ranks))
    with split.at_beginning():
        found["beginning"] = difference(answers(split, rank, ranks), before)
    found["finite"] = split.weights.finite()
    if rank == ranks - 1:
        local(next(one for one in split.weights.trained() if local(one).numel())).fill_(torch.nan)
    found["finite with a NaN on the last rank"] = split.weights.finite()
    if accelerator.is_main_process:
        print(json.dumps(found))
    # A process that is gone takes its connections with it.
    accelerator.wait_for_everyone()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
