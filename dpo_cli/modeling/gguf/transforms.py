"""How a weight lies in a GGUF file where it lies otherwise than in the model.

Each takes a weight, whose content it leaves alone, and the model's configuration. They use methods of tensors, since
the table of architectures is read before torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def pair_queries(weight: Tensor, config: Any) -> Tensor:
    """Put beside each other what positions turn together: within a head, the model has them half a head apart."""
    return _paired(weight, config.num_attention_heads)


def pair_keys(weight: Tensor, config: Any) -> Tensor:
    """Pair as `pair_queries` the heads of the keys, of which there may be fewer."""
    return _paired(weight, config.num_key_value_heads or config.num_attention_heads)


def _paired(weight: Tensor, heads: int) -> Tensor:
    parted: Tensor = weight.unflatten(0, (heads, 2, -1))
    return parted.transpose(1, 2).reshape(weight.shape)


def add_one(weight: Tensor, config: Any) -> Tensor:
    """Store the factor itself, of which the model keeps the distance from one."""
    return weight.float() + 1


def transpose(weight: Tensor, config: Any) -> Tensor:
    """Store outputs by inputs what the model keeps inputs by outputs."""
    return weight.transpose(0, 1)


def part_heads(weight: Tensor, config: Any) -> Tensor:
    """Store all queries, then all keys, then all values, which the model has head by head."""
    parted: Tensor = weight.unflatten(0, (config.n_head, 3, -1))
    return parted.transpose(0, 1).reshape(weight.shape)
