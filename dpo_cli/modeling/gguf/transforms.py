"""How a weight lies in a GGUF file where it lies otherwise than in the model.

Each takes a weight, whose content it leaves alone, and the model's configuration. They use methods of tensors, since
the table of architectures is read before torch is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def as_it_is(weight: Tensor, config: Any) -> Tensor:
    """Store what the model has."""
    return weight


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


def gates(weight: Tensor, config: Any) -> Tensor:
    """Take the gates of experts, whose rows are before those of the other projection."""
    return weight.narrow(1, 0, weight.shape[1] // 2)


def ups(weight: Tensor, config: Any) -> Tensor:
    """Take what experts project up, whose rows are behind those of the gates."""
    return weight.narrow(1, weight.shape[1] // 2, weight.shape[1] // 2)


def only_row(weight: Tensor, config: Any) -> Tensor:
    """Store a matrix of one row as that."""
    return weight.squeeze(0)


def kernel(weight: Tensor, config: Any) -> Tensor:
    """Store a convolution within each channel without the dimension of the channels that it takes in, which is one."""
    return weight.squeeze(1)


def decay(weight: Tensor, config: Any) -> Tensor:
    """Store by how much a state decays, of which the model keeps the logarithm of the negative."""
    return -weight.float().exp()


def value_heads(weight: Tensor, config: Any) -> Tensor:
    """Store one number or row of each value head: by turns of the key heads, by which the model has them together."""
    return _by_turns(weight, config, 1)


def decay_of_value_heads(weight: Tensor, config: Any) -> Tensor:
    """Store the decay of each value head."""
    return decay(value_heads(weight, config), config)


def value_rows(weight: Tensor, config: Any) -> Tensor:
    """Store as `value_heads` what has as many rows as value heads have dimensions."""
    return _by_turns(weight, config, config.linear_value_head_dim)


def value_columns(weight: Tensor, config: Any) -> Tensor:
    """Store as `value_rows` what has a column for each of them."""
    return value_rows(weight.transpose(0, 1), config).transpose(0, 1)


def mixed_rows(weight: Tensor, config: Any) -> Tensor:
    """Store as `value_rows` those rows that come behind the rows of queries and keys."""
    before: int = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    turned = weight.clone()
    turned[before:] = value_rows(weight[before:], config)
    return turned


def mixed_kernel(weight: Tensor, config: Any) -> Tensor:
    """Store the convolution of such rows."""
    return mixed_rows(kernel(weight, config), config)


def _by_turns(weight: Tensor, config: Any, rows: int) -> Tensor:
    """Put rows of value heads that are together for each key head in turn."""
    apart: Tensor = weight.unflatten(0, (config.linear_num_key_heads, -1, rows))
    return apart.transpose(0, 1).reshape(weight.shape)
