"""Weights of 32 bits in two halves: bfloat16, which a model computes with, and the 16 bits that these lack.

The low bits are kept with the parameter, so that whoever has it has its whole value. A copy of a model has none: it
answers as the model does, and does not train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dpo_cli.modeling.shards import is_sharded, local, set_local

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn import Parameter
    from transformers import PreTrainedModel

_STRETCH = 2**24
"""How many numbers are split or merged at once, so that what it takes beside them stays small."""
_HALF = 0x8000


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bfloat16 numbers nearest to float32 ones, and what these lack, 16 bits each.

    Halves are rounded away from zero: rounded to even, 16 bits would not tell on which side the whole value was. NaN
    stays NaN in both halves.

    Args:
        values: float32, contiguous.
    """
    high = torch.empty_like(values, dtype=torch.bfloat16)
    low = torch.empty_like(values, dtype=torch.int16)
    _split_into(values.view(-1), high.view(-1), low.view(-1))
    return high, low


def merge(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 numbers that were split, bit for bit."""
    merged = torch.empty_like(high, dtype=torch.float32)
    bits = merged.view(torch.int32)
    bits.copy_(high.view(torch.int16))
    bits <<= 16
    for all_bits, missing in zip(bits.view(-1).split(_STRETCH), low.view(-1).split(_STRETCH), strict=True):
        all_bits += missing.to(all_bits.device, non_blocking=True)
    return merged


def _split_into(values: Tensor, high: Tensor, low: Tensor) -> None:
    parts = (tensor.split(_STRETCH) for tensor in (values, high, low))
    for whole, upper, lower in zip(*parts, strict=True):
        bits = whole.view(torch.int32)
        rounded = (bits + _HALF) >> 16
        # The last NaNs would be rounded to a number.
        rounded.masked_fill_(whole.isnan(), 0x7FC0)
        upper.view(torch.int16).copy_(rounded)
        rounded <<= 16
        lower.copy_((bits - rounded).to(torch.int16), non_blocking=True)


def split_weights(
    model: PreTrainedModel, device: torch.device | str, gradients: torch.dtype, *, low_on_host: bool = False
) -> None:
    """Split every weight of a model, one after the other, on the device where the model is going to be.

    Args:
        model: The model; its weights are float32, or bfloat16 that lacks nothing.
        device: Where.
        gradients: The dtype that gradients of its weights are added up in.
        low_on_host: Whether the low bits stay in the host's memory.
    """
    for parameter in model.parameters():
        high, low = split(parameter.detach().to(device).float().contiguous())
        parameter.data = high
        parameter.grad_dtype = gradients
        parameter.low_bits = on_host(low) if low_on_host else low


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory, which a GPU reads and writes without stopping for it."""
    pinned = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor)


def low_bits(parameter: Tensor) -> Tensor | None:
    """Return the low bits of a parameter that is split, or None."""
    found: Tensor | None = getattr(parameter, "low_bits", None)
    return found


def drop_low_bits(model: PreTrainedModel) -> None:
    """Forget what a model that does not train never looks at."""
    for parameter in model.parameters():
        parameter.low_bits = None


def whole_value(parameter: Tensor) -> Tensor:
    """Return the value of a parameter where it is: merged where it is in two halves, else its own memory.

    Of one that is sharded over processes it is what this process has.
    """
    low = low_bits(parameter)
    return local(parameter) if low is None else merge(parameter.detach(), low)


def whole_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of what `whole_value` returns."""
    return parameter.dtype if low_bits(parameter) is None else torch.float32


def set_whole_value(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter another value; nothing is done where `value` is its own memory."""
    low = low_bits(parameter)
    if is_sharded(parameter):
        set_local(parameter, value)
    elif low is not None:
        value = value.detach().to(parameter.device, torch.float32).contiguous()
        _split_into(value.view(-1), parameter.detach().view(-1), low.view(-1))
    elif value.data_ptr() != parameter.data_ptr():
        parameter.detach().copy_(value)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's `state_dict`; of weights that are split, the parameters: `whole_value` returns their values."""
    parameters = {id(parameter) for parameter in _split_parameters(model)}
    return {
        name: tensor if id(tensor) in parameters else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def _split_parameters(model: nn.Module) -> Iterator[Parameter]:
    return (parameter for parameter in model.parameters() if low_bits(parameter) is not None)
