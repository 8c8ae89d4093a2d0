"""Dataclasses of tensors sent to a device by one copy, for which the host does not wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

ALIGNED_BYTES = 128
"""Where tensors begin in the buffer: kernels read up to 16 bytes at once, and a GPU's memory in lines of 128."""


@dataclass(frozen=True)
class Parcel(Generic[T]):
    """A dataclass whose tensors are parts of one buffer.

    Attributes:
        value: The dataclass, its tensors views of the buffer.
        buffer: `[bytes]`, in the host's memory.
    """

    value: T
    buffer: Tensor

    @classmethod
    def of(cls, value: T, *, pinned: bool) -> Parcel[T]:
        """Copy all tensors of a dataclass into one buffer.

        Args:
            value: A dataclass, its tensors on the CPU, as `with_tensors` finds them.
            pinned: Whether the buffer is in memory that a GPU reads by itself: only then nobody waits for the copy.
        """
        found: list[Tensor] = []
        with_tensors(value, found.append)
        starts = [0]
        for tensor in found:
            starts.append(starts[-1] + -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES)
        buffer, place = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned), iter(starts)
        return cls(with_tensors(value, lambda tensor: _part(buffer, next(place), tensor).copy_(tensor)), buffer)

    def to(self, device: torch.device) -> T:
        """Send the buffer; return the dataclass with its tensors on the device, in the order of its work."""
        sent = self.buffer.to(device, non_blocking=True)
        arrived: T = with_tensors(
            self.value, lambda part: _part(sent, int(part.storage_offset()) * part.itemsize, part)
        )
        return arrived


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a part of a buffer as a tensor of the type and shape of another."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def sent(value: T, device: torch.device) -> T:
    """Return a dataclass with all of its tensors on a device."""
    return packed(value, device)()


def packed(value: T, device: torch.device) -> Callable[[], T]:
    """Pack a dataclass for a device; return what sends it and returns it there. For a CPU nothing is copied."""
    if device.type == "cpu":
        return lambda: value
    parcel = Parcel.of(value, pinned=device.type == "cuda")
    return lambda: parcel.to(device)


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a value with each of its tensors replaced by what `change` returns, in the order of its fields.

    They are looked for in dataclasses and mappings; and in tuples, of which the first item tells whether they hold any.
    """
    if isinstance(value, Tensor):
        return change(value)
    if not _holds_tensors(value):
        return value
    if isinstance(value, Mapping):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(with_tensors(item, change) for item in value)
    parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return dataclasses.replace(
        value, **{name: with_tensors(part, change) for name, part in parts.items() if _holds_tensors(part)}
    )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, tuple):
        return bool(value) and _holds_tensors(value[0])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_tensors(getattr(value, field.name)) for field in dataclasses.fields(value))
    return False
