"""A pass of no pairs: it takes next to no memory, and gives every weight a gradient of 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.like = [(one.shape, one.grad_dtype or one.dtype, one.device) for one in weights]
        return weights[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        # One number each, whatever the shape.
        return tuple(torch.zeros((), dtype=dtype, device=on).expand(shape) for shape, dtype, on in ctx.like)


def nothing_of(weights: Iterable[Parameter]) -> Tensor:
    """Return a 0 whose gradient by each of some weights is 0."""
    found: Tensor = _Nothing.apply(*weights)  # type: ignore[no-untyped-call]
    return found
