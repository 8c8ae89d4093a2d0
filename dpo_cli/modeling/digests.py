"""Digests of weights: computed where the weights are, and the same for a tensor as a whole and in parts.

Of each tensor Σ value · mix(index) mod 2⁶⁴ is summed in two lanes, over all 32 bits of its bytes; the sums, with the
names, dtypes and shapes, are then digested as text. Bits count, not values: −0 is not 0, and one NaN is not another.

This is for accidents, not for attackers: it tells a checkpoint, a cache or an adapter whether it belongs to these
weights. Two models that differ by chance, by training or by a damaged disk share a digest about once in 2⁶⁵ cases;
whoever can choose the weights can make two that share one. Files are sealed with SHA-256 instead.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_cli.modeling.shards import added_up, is_sharded, local, rows_of
from dpo_cli.modeling.split import whole_dtype, whole_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEME = "sums1:"
"""What every digest begins with; another one is of another version of the program and says nothing about these."""

_NO_PART_OF_A_MODEL = {"transformers_version", "_name_or_path", "architectures", "dtype", "use_cache"}
"""Settings that say where a model came from or how it is called, not what it answers."""

_ROW, _ROWS = 2**14, 256
"""How many 32-bit units have factors of their own, and how many such rows a GPU takes at a time: 32 MB in 64 bits.

On a CPU it is one row, which is so short that torch takes one thread for it.
"""
_PART_BYTES = 2**22
"""What a thread takes at a time."""
_UNIT_BYTES = 4
_FIRST_ROW = 2**48
"""The index that the factors of rows begin with, far from those of units."""


def weights_digest(
    model: PreTrainedModel, own_name: Callable[[str], str | None] = str, dtype: torch.dtype | None = None
) -> str:
    """Return a digest of a model's architecture and of every weight's bytes, those that no gradient moves included.

    Args:
        model: The model.
        own_name: Returns the name that a weight has in the model by itself; None for one that was added to it.
        dtype: What the weights are taken to be held in; None: in what they are.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NO_PART_OF_A_MODEL}
    parameters = dict(model.named_parameters())
    # Of tied weights one counts.
    counted = {
        own: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (name in parameters or not isinstance(tensor, torch.nn.Parameter)) and (own := own_name(name)) is not None
    }
    return tensors_digest(settings, counted, dtype, _kept(model, counted, dtype) if dtype else ())


def _kept(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> list[str]:
    """Return which weights transformers loads in float32 where a model is loaded in a dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    return list(filter(build_glob_alternation(list(plan))[0].search, names)) if plan else []


def tensors_digest(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    kept: Collection[str] = (),
) -> str:
    """Return a digest of settings, and of the names and the bytes of tensors in their order.

    Args:
        settings: What decides how the tensors are used.
        tensors: By name.
        dtype: What those of floats are taken to be held in; None: in what they are.
        kept: Names of those that are in what they are all the same.
    """
    whole = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=32)
    held = [
        dtype if dtype and one.is_floating_point() and name not in kept else whole_dtype(one)
        for name, one in tensors.items()
    ]
    for (name, tensor), kind, sums in zip(tensors.items(), held, _sums_of_all(tensors.values(), held), strict=True):
        whole.update(f"{name} {kind} {tuple(tensor.shape)} {sums}\n".encode())
    return SCHEME + whole.hexdigest()


def _sums_of_all(tensors: Iterable[Tensor], held: Iterable[torch.dtype]) -> list[list[int]]:
    """Return the sums of tensors, each in its dtype; parts of those that a CPU holds are shared between threads.

    torch's own threads would wait for each other after every block: on a busy machine nearly all of the time.
    """
    all_tensors = list(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = []
        for tensor, kind in zip(all_tensors, held, strict=True):
            elements = whole_value(tensor).reshape(-1)
            first = rows_of(tensor)[0] * tensor[:1].numel() if is_sharded(tensor) else 0
            size = max(1, len(elements)) if elements.device.type != "cpu" else _PART_BYTES // kind.itemsize
            starts = range(0, max(1, len(elements)), size)
            found.append([pool.submit(bit_sums, elements[at : at + size], first + at, kind) for at in starts])
            if elements.data_ptr() != local(tensor).data_ptr():
                # It was made for this.
                wait(found[-1])
        sums = [torch.stack([part.result() for part in parts]).sum(0) for parts in found]
    return [one.tolist() for one in added_up(sums, all_tensors)]


@torch.no_grad()
def bit_sums(part: Tensor, first: int = 0, held: torch.dtype | None = None) -> Tensor:
    """Return two sums over the bits of a tensor, or of a part of it; those of its parts add up to those of the whole.

    Args:
        part: Elements that follow each other in the flattened tensor.
        first: The index of the first of them in it.
        held: The dtype that they are taken to be held in; None: in what they are.

    Returns:
        int64, `[2]`, on the tensor's device.
    """
    held, elements = held or part.dtype, part.detach().reshape(-1)
    of_row, device = _ROW * _UNIT_BYTES // held.itemsize, elements.device
    most, first_row, start = 1 if device.type == "cpu" else _ROWS, first // of_row, 0
    sums = []
    while start < len(elements):
        place, left = (first + start) % of_row, len(elements) - start
        taken = min(most, left // of_row) * of_row if not place and left >= of_row else min(of_row - place, left)
        block = elements[start : start + taken].to(held).view(torch.uint8)
        sums.append(_sums_of_rows(_units(block, place * held.itemsize), place * held.itemsize // _UNIT_BYTES))
        start += taken
    if not sums:
        return torch.zeros(2, dtype=torch.int64, device=device)
    found = torch.cat(sums, dim=1)
    rows = torch.arange(first_row, first_row + found.shape[1], dtype=torch.int64, device=device)
    return (found * (_mixed(rows + _FIRST_ROW) | 1)).sum(1)


def _units(block: Tensor, first_byte: int) -> Tensor:
    """Return bytes as 32-bit units; where only a part of one is there, the rest is 0, which adds nothing."""
    before = first_byte % _UNIT_BYTES
    after = -(before + len(block)) % _UNIT_BYTES
    if before or after:
        block = torch.nn.functional.pad(block, (before, after))
    elif block.storage_offset() % _UNIT_BYTES:
        block = block.clone()
    return block.view(torch.int32)


def _sums_of_rows(units: Tensor, place: int) -> Tensor:
    """Return the sums of each of some rows in both lanes, int64, `[2, rows]`.

    Args:
        units: A part of a row, or whole rows.
        place: The index of the first unit in its row.
    """
    wide = units.to(torch.int64).view(-1, min(len(units), _ROW))
    factors = _factors(units.device)
    return torch.stack([(wide * factors[lane, place : place + wide.shape[1]]).sum(1) for lane in (0, 1)])


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """Return the factors of the units of a row in both lanes, `[2, _ROW]`, all odd, so that no bit is lost."""
    mixed = _mixed(torch.arange(_ROW, dtype=torch.int64, device=device))
    # The highest bit of a unit sees the 33 lowest bits of a factor alone: the lanes have different ones there.
    return torch.stack((mixed | 1, _shifted(mixed, 31) | 1))


def _mixed(index: Tensor) -> Tensor:
    """Return 64 bits for each index that look random.

    Source: SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.
    """
    x = (index + 1) * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift 64 bits to the right and fill up with zeros; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
