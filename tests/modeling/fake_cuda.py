"""A GPU that is not there: its tensors have device, type and shape, and no values; what a host waits for is counted."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

CUDA = torch.device("cuda", 0)

_ASKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "allclose", "index_add", "index_add_", "index_copy", "index_copy_", "index_put_",
}  # fmt: skip
"""Operations of which the host waits for the answer; the last five look, where kernels are deterministic, whether all
places are within the tensor. (`index_put` stands in for what does not, in gradients of tensors without values.)"""


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Let new tensors have no values, those on CUDA included; a build of torch for CPUs alone is enough.

    Whatever depends on a value on the device fails (`DataDependentOutputException`), and so does what mixes devices.
    """
    make, mode = torch.Tensor._make_subclass, _MetaIsCuda(allow_non_fake_inputs=True)

    def make_subclass(cls: type, data: torch.Tensor, requires_grad: bool = False, **options: Any) -> Any:
        # Autograd of a build without CUDA has no streams for such a device, and shall see what holds no memory anyway.
        of_cuda = getattr(options.get("device_for_backend_keys"), "type", None) == "cuda"
        return make(cls, data, requires_grad, **({} if of_cuda else options))

    # On a GPU that is there transformers takes its way for tensors with values.
    values = mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False)
    with values, mock.patch.object(torch.Tensor, "_make_subclass", staticmethod(make_subclass)), mode:
        yield


class _MetaIsCuda(FakeTensorMode):
    """Puts on CUDA what torch's own code makes beside a tensor without values: to it these are on `meta`."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(kwargs.get("device"), "type", None) == "meta":
            kwargs["device"] = CUDA
        for one in args:
            if isinstance(one, FakeTensor) and one.fake_device.type == "meta":
                one.fake_device = CUDA
        return super().dispatch(func, types, args, kwargs)


class HostStops(TorchDispatchMode):
    """Counts, within `fake_cuda`, for what the host waits, by name, and what is copied to the device without a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: collections.Counter[str] = collections.Counter()
        self.sent = 0
        self._pinned: list[torch.Tensor] = []

    def __enter__(self) -> HostStops:
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: self._answer(tensor)))
        make = torch.Tensor.new_tensor

        def new_tensor(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.stops["new_tensor"] += tensor.device == CUDA
            return make(tensor, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(torch.Tensor, "new_tensor", new_tensor))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _answer(self, tensor: FakeTensor) -> list[float]:
        self.stops["tolist"] += tensor.device == CUDA
        return [1.0] * tensor.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        # Some of them fail, since there is no answer.
        if name in _ASKS and any(isinstance(one, torch.Tensor) and one.device == CUDA for one in args):
            self.stops[name] += 1
        result = func(*args, **kwargs)
        if name == "empty" and kwargs.get("pin_memory"):
            self._pinned.append(result)
        tensors = [one for one in (*args, result) if isinstance(one, torch.Tensor)]
        if name in ("_to_copy", "copy_") and len({one.device.type for one in tensors}) > 1:
            source = args[1] if name == "copy_" else args[0]
            free = kwargs.get("non_blocking") and _storage(source) in map(_storage, self._pinned)
            if free and source.device.type == "cpu":
                self.sent += 1
            else:
                self.stops[f"{name} from {source.device.type}"] += 1
        indexed = args[1] if name.strip("_").startswith("index") and isinstance(args[1], (tuple, list)) else ()
        if indexed and args[0].device == CUDA and any(one is not None and one.device != CUDA for one in indexed):
            self.stops["index on the CPU"] += 1
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
