"""What a checkpoint keeps of optimizer and reference, read by any number of processes, whatever number wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from dpo_cli.errors import UserError
from dpo_cli.modeling.eight_bits import BLOCK, IN_8_BITS, SCALE
from dpo_cli.modeling.folders.shard_files import Piece, Shards, sharded_like
from dpo_cli.modeling.stepping import OneByOne
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from dpo_cli.training.learner import Learner

OPTIMIZER, REFERENCE = "optimizer.safetensors", "reference.safetensors"
"""The files of one process."""

KEPT, MOVING = "optimizer", "reference"
"""What is in them, as a list of shards calls it."""


def trained_in_order(learner: Learner) -> list[tuple[str, Parameter]]:
    """Return names and weights in the order in which the optimizer counts them."""
    names = {id(weights): name for name, weights in learner.policy.weights.moved().items()}
    return [(names[id(weights)], weights) for group in learner.optimizer.param_groups for weights in group["params"]]


def is_by_rows(kind: str, kept: Sequence[int], rows: Sequence[int]) -> bool:
    """Tell whether what is kept of a weight, of that shape, has as many rows as the weight and is sharded like it."""
    of_columns = kind == "col_var" and len(kept) == 2
    return bool(kept) and kept[0] == rows[0] and not of_columns


def kept_tensors(path: Path, learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Return what this process needs of the optimizer's state and of a reference that moves, as `LearnerState` has it.

    Args:
        path: A checkpoint, of whatever number of processes.
        learner: What goes on from it.

    Raises:
        DamagedFolder: It is not what was written there.
        UserError: Moments in 8 bits cannot be sharded in the way of these processes.
        KeyError: It is of other weights.
    """
    sharded = Shards.in_folder(path) if Shards.are_in(path) else None
    shards = sharded or Shards.in_file(path / OPTIMIZER, KEPT)
    device, found = learner.accelerator.device, {OPTIMIZER: dict[str, torch.Tensor]()}
    kept: dict[str, list[str]] = {}
    for key in shards.shapes(KEPT):
        weight, _, kind = key.rpartition(".")
        kept.setdefault(weight, []).append(kind)
    for index, (name, weights) in enumerate(trained_in_order(learner)):
        for kind in kept.pop(name if sharded else str(index), ()):
            key = f"{name if sharded else index}.{kind}"
            found[OPTIMIZER][f"{index}.{kind}"] = _own_of_kept(shards, key, weights, learner).to(device)
    if kept:
        raise KeyError(f"{min(kept)} is no weight that trains")
    if learner.reference.moving is not None:
        theirs = sharded or Shards.in_file(path / REFERENCE, MOVING)
        found[REFERENCE] = {
            name: sharded_like(ours, _own_rows(theirs, MOVING, name, ours).to(device))
            for name, ours in learner.reference.moving.weights.tensors().items()
        }
    return found


def _own_of_kept(shards: Shards, key: str, weights: Parameter, learner: Learner) -> Tensor:
    """Return what this process needs of something that an optimizer kept of a weight, as it keeps it."""
    kind, shape = key.rpartition(".")[2], shards.shapes(KEPT)[key]
    here = Piece.of(weights, is_main=False)
    if kind.endswith(SCALE):
        return _own_scales(shards, key, here)
    if not is_by_rows(kind, shape, here.shape):
        return shards.whole(KEPT, key)
    rows = shards.rows(KEPT, key, here.first, here.first + here.rows[0])
    if _steps_on_rows(learner) or not isinstance(weights, DTensor) or tuple(shape) != here.shape:
        return rows
    return sharded_like(weights, rows)


def _steps_on_rows(learner: Learner) -> bool:
    """Tell whether the optimizer steps on what is here of each weight, and knows nothing of the whole."""
    return isinstance(getattr(learner.optimizer, "optimizer", learner.optimizer), OneByOne)


def _own_rows(shards: Shards, kind: str, name: str, ours: Tensor) -> Tensor:
    """Return the rows that this process has of a tensor of its own."""
    here = Piece.of(ours, is_main=False)
    return shards.rows(kind, name, here.first, here.first + (here.rows[0] if here.rows else 1))


def _own_scales(shards: Shards, key: str, here: Piece) -> Tensor:
    """Return the scales of the rows that this process has of a weight.

    Raises:
        UserError: Blocks of moments that have one scale would be cut.
    """
    moments = shards.parts(KEPT, key.removesuffix(SCALE) + IN_8_BITS)
    mine, of_row = (here.first, here.first + here.rows[0]), math.prod(here.shape[1:])
    if mine in moments:
        return shards.rows(KEPT, key, *shards.parts(KEPT, key)[moments.index(mine)])
    if of_row % BLOCK and mine[0] < mine[1]:
        what = f"the moments of `{key.rpartition('.')[0]}` have 8 bits, in blocks that other processes would cut"
        hint = f"resume on {several(shards.processes, 'process', 'processes')}, as the checkpoint was written"
        raise UserError(what, "`training.optimizer: adamw_8bit`", hint)
    return shards.rows(KEPT, key, *(row * of_row // BLOCK for row in mine))
