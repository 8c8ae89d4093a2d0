"""Tensors go to a file, and from it to their device, one at a time: the host never holds a copy of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import PROTO
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from dpo_cli.system.storage import write_flushing

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""What safetensors calls the types, in its order: a file holds those of the last first, and equal ones by name."""

DTYPES = {called: dtype for dtype, called in NAMES.items()}
"""The types by what safetensors calls them."""


def save_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    content: Callable[[str], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    unlike_pickle: bool = False,
) -> None:
    """Write tensors as a safetensors file, byte for byte as `safetensors.torch.save_file` would.

    That one copies all tensors to the host before it writes the first, and no other thread runs while it writes.

    Args:
        tensors: By name, on whatever device. Those that share memory are written under each of their names.
        file: Where to.
        content: Returns the tensor of a name, which is written in the dtype that `tensors` has for it; called once
            each, in the order of the file. None: those of `tensors`.
        metadata: What the file says beside them.
        unlike_pickle: Whether to make the header longer where the file, which begins with the length of that, would
            begin as a pickle does; safetensors would not.
    """
    names = in_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if unlike_pickle and len(text).to_bytes(8, "little").startswith(PROTO):
        text += b" " * 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        held = ((content or tensors.__getitem__)(name).detach().to(tensors[name].dtype) for name in names)
        write_flushing(opened, map(_bytes_of, held))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, which is copied where it is not in the host's memory in one piece."""
    held: memoryview = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return held


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors in the order in which a file has them."""
    order = list(NAMES)
    return sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))


def load_tensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto a device; single numbers stay on the host, where optimizers count."""
    found = {}
    with safe_open(file, framework="pt", backend="pread") as opened:
        for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
            tensor = opened.get_tensor(name)
            found[name] = tensor.to(device) if tensor.dim() else tensor
    return found
