"""A model computes in float32 for a while, whatever its weights are held in.

No copy of the model is made: each layer's weights are cast to float32 while it computes, and again in the backward
pass. So what it takes is one layer and the vocabulary matrix in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_cli.modeling.shards import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOWER = torch.float32.itemsize
"""Bytes of a number below which it is cast."""


@contextlib.contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute in float32: autocast is off, and weights held in fewer bits are cast layer by layer.

    Quantized matrices multiply as what their few bits stand for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        stack.enter_context(_quantized_in_float32(model))
        # Weights that are sharded over processes may be rounded where they are made whole.
        if any(_is_lower(one) or is_sharded(one) for one in (*model.parameters(), *model.buffers())):
            stack.enter_context(_cast_by_layers(model))
        yield


@contextlib.contextmanager
def _cast_by_layers(model: PreTrainedModel) -> Iterator[None]:
    """Cast weights to float32 while what owns them computes."""
    cast = _Cast()
    with contextlib.ExitStack() as stack:
        for part, owners in _parts(model):
            before = functools.partial(cast.apply, owners)
            # Weights that are sharded over processes are whole only within the hooks that were there before.
            stack.callback(part.register_forward_pre_hook(lambda *_, before=before: before()).remove)
            restore = part.register_forward_hook(lambda *_: cast.restore(), prepend=True, always_call=True)
            stack.callback(restore.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(cast.pack, _unpack))
        yield


class _Kept(NamedTuple):
    """What stands for a cast tensor that autograd keeps: what it was cast from, and which view of it that is."""

    held: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass
class _Cast:
    """The tensors that are cast at the moment, by the parts that compute: one, or others inside it."""

    parts: list[list[tuple[dict[str, Any], str, Tensor]]] = field(default_factory=list)
    held: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, owners: Iterable[nn.Module]) -> None:
        """Put tensors in float32 in the place of those that modules own and that have fewer bits."""
        self.parts.append([])
        for owner in owners:
            stores: tuple[dict[str, Any], ...] = owner._parameters, owner._buffers
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and _is_lower(tensor):
                        store[name] = wide = tensor.float()
                        self.parts[-1].append((store, name, tensor))
                        self.held[wide.untyped_storage().data_ptr()] = tensor.detach()

    def restore(self) -> None:
        """Put back what the modules of the last part own."""
        for store, name, tensor in self.parts.pop():
            self.held.pop(store[name].untyped_storage().data_ptr(), None)
            store[name] = tensor

    def pack(self, tensor: Tensor) -> Tensor | _Kept:
        """Let autograd keep what a weight was cast from in place of the cast weight."""
        if (held := self.held.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor
        return _Kept(held, tensor.shape, tensor.stride(), tensor.storage_offset())


def _unpack(kept: Tensor | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.held.float().as_strided(kept.size, kept.stride, kept.offset)


def _is_lower(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < _LOWER and tensor.numel() > 0


def _parts(model: PreTrainedModel) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield what is called, with the modules whose weights are cast while it computes.

    A layer is cast as a whole, since its parts may use weights of others without calling them; the vocabulary matrix
    all the time that it may be asked for, since some models look at its dtype first; any other module by itself.
    """
    head = model.get_output_embeddings()
    yield model, [model, head]
    for child in model.children():
        yield from _parts_of(child, head)


def _parts_of(module: nn.Module, head: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    if isinstance(module, nn.ModuleList):
        yield from ((layer, list(layer.modules())) for layer in module)
    elif module is not head:
        yield module, [module]
        for child in module.children():
            yield from _parts_of(child, head)


@contextlib.contextmanager
def _quantized_in_float32(model: nn.Module) -> Iterator[None]:
    """Let the quantized layers of a model multiply in float32; what they answer comes in what they are asked in."""
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
