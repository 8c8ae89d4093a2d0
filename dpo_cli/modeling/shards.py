"""Weights that are sharded over processes: by rows, each process has some that follow each other.

What a process has of a tensor is looked at here; where all of it is needed, its processes have to ask together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter

from dpo_cli.modeling.compiled import decoder_layers

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from dpo_cli.modeling.scorer import Scorer

SHARD, REPLICATE = "shard", "replicate"
"""The dimensions of a mesh: processes that shard weights among themselves, and groups of them that have the same."""


def mesh_of(device: torch.device, sharding: str) -> DeviceMesh:
    """Return the processes of a run, as they shard weights: all of them, or those of a machine."""
    world = distributed.get_world_size()
    if sharding == "full":
        return init_device_mesh(device.type, (world,), mesh_dim_names=(SHARD,))
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=(REPLICATE, SHARD))


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, without copying it: of one that is not sharded, all of it."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Return which rows of a tensor this process has: from the first, to before the second."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 1
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is sharded over processes."""
    return isinstance(tensor, DTensor)


def is_placeholder(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for one whose values are not there yet."""
    return tensor.numel() > 1 and not any(tensor.stride())


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of a shape, on the CPU, that takes the memory of one number."""
    return torch.zeros((), dtype=dtype).expand(*shape)


def set_local(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter that is sharded other values.

    Args:
        parameter: The parameter.
        value: All of it, or sharded in the same way.
    """
    if is_sharded(value):
        local(parameter).copy_(local(value))
    else:
        start, stop = rows_of(parameter)
        local(parameter).copy_(value.detach()[start:stop])


def placeholders(model: PreTrainedModel) -> None:
    """Give a model on the meta device weights on the CPU that take no memory: each is one number, seen everywhere."""
    made: dict[int, Parameter] = {}
    for module, name, parameter in _weights(model):
        if id(parameter) not in made:
            empty = placeholder(parameter.shape, parameter.dtype)
            made[id(parameter)] = Parameter(empty, requires_grad=parameter.requires_grad)
        module._parameters[name] = made[id(parameter)]


def share_rows(model: nn.Module, others: Mapping[int, Tensor]) -> None:
    """Let weights of a model that is sharded, and has not answered yet, be in the memory of others that do not train.

    Args:
        model: The model; what FSDP gathers, it looks up before the first answer.
        others: Those of another model, sharded alike, by the identity of this one's.
    """
    made = {ours: Parameter(theirs.detach(), requires_grad=False) for ours, theirs in others.items()}
    for module, name, parameter in _weights(model):
        module._parameters[name] = made.get(id(parameter), parameter)


def unspread(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that is not sharded yet; placeholders take no memory in it either."""
    shared: dict[int, Any] = {id(one): one for one in model.parameters() if is_placeholder(one)}
    other: PreTrainedModel = copy.deepcopy(model, shared)
    return other


def spread(scorer: Scorer, mesh: DeviceMesh, device: torch.device, computed_in: torch.dtype | None) -> None:
    """Shard a model's weights over processes, one decoder layer after the other; embeddings, norm and head at last.

    While a layer computes its weights are whole, and those of the rest while the scorer does.

    Args:
        scorer: Answers; placeholders among its model's weights get memory, and their values are left open.
        mesh: The processes.
        device: Where this process computes.
        computed_in: What whole weights are rounded to while they compute; None: they are as they are.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=computed_in,
        reduce_dtype=torch.float32 if computed_in else None,
        cast_forward_inputs=False,
    )
    # FSDP marks what a pass returns, and what is a view is not to be marked.
    scorer.register_forward_hook(lambda *about: about[-1].clone() if torch.is_tensor(about[-1]) else about[-1])
    for unit in (*decoder_layers(scorer.policy), scorer):
        _materialize(unit, device)
        root = fully_shard(unit, mesh=mesh, mp_policy=policy)
        if computed_in:
            _add_up_in_float32(unit)

    def after_pass(*_: object) -> None:
        # FSDP leaves the last part whole after a pass without gradient, whatever becomes of its shards meanwhile.
        if not torch.is_grad_enabled():
            root.reshard()

    scorer.register_forward_hook(after_pass, always_call=True)


def _add_up_in_float32(unit: nn.Module) -> None:
    """Let gradients of weights that are rounded for a pass, and used in several places of it, add up unrounded."""

    def first_pass(*_: object) -> None:
        for weights in unit.parameters():
            if not is_sharded(weights):
                weights.grad_dtype = torch.float32
        hook.remove()

    hook = unit.register_forward_pre_hook(first_pass)


def _materialize(unit: nn.Module, device: torch.device) -> None:
    """Give memory on a device to the placeholders within a part of a model, and bring all else there."""
    made: dict[int, Parameter] = {}
    for module, name, parameter in _weights(unit):
        if isinstance(parameter, DTensor):
            continue
        if id(parameter) not in made:
            whole = parameter.detach()
            if is_placeholder(parameter):
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made[id(parameter)] = Parameter(whole.to(device), requires_grad=parameter.requires_grad)
        module._parameters[name] = made[id(parameter)]
    for module in unit.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, Parameter]]:
    """Yield each weight with the module that owns it and its name there; tied ones at every place."""
    for module in model.modules():
        yield from ((module, name, one) for name, one in list(module._parameters.items()) if one is not None)


def added_up(found: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what each process has found of tensors, added up over those that have parts of them.

    Args:
        found: One of the same shape for each tensor; of tensors that are not sharded it stays as it is.
        tensors: The tensors.
    """
    sharded = [at for at, tensor in enumerate(tensors) if is_sharded(tensor)]
    sums = list(found)
    if sharded:
        together = torch.stack([found[at] for at in sharded])
        distributed.all_reduce(together, group=_group_of(tensors[sharded[0]]))
        for at, one in zip(sharded, together, strict=True):
            sums[at] = one
    return sums


def reduced(found: float, tensors: Iterable[Tensor], how: distributed.ReduceOp.RedOpType) -> float:
    """Return the smallest, or the largest, of what each process has found of tensors, where they are sharded."""
    sharded = next(filter(is_sharded, tensors), None)
    if sharded is None:
        return found
    result = torch.tensor(float(found), device=local(sharded).device)
    distributed.all_reduce(result, how)
    return float(result)


def _group_of(tensor: Tensor) -> distributed.ProcessGroup:
    """Return the processes that a tensor is sharded over."""
    assert isinstance(tensor, DTensor)
    sharded = next(at for at, placement in enumerate(tensor.placements) if isinstance(placement, Shard))
    return tensor.device_mesh.get_group(sharded)


def gradients_of(value: Tensor, weights: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Return the gradients of a number by weights; of sharded ones the mean of the processes, sharded alike.

    Args:
        value: The number.
        weights: The weights; those that have no part in it have zeros.
        model: Has the weights, and no gradient before and after.
    """
    if not any(map(is_sharded, weights)):
        return list(torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True))
    # A weight that is sharded is in no graph: its gradient comes as in a step, with those of all others.
    value.backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
    model.zero_grad()
    return found
