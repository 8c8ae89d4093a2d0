"""What one of several processes holds of a model whose weights are sharded, and what it gathers for a time.

Counted as torch's `fully_shard` allocates it, where every decoder layer is a group and all else is the root: a weight
is sharded by rows, of which the first process has as many as any.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dpo_cli.modeling.compiled import decoder_layers
from dpo_cli.modeling.shards import is_placeholder, local
from dpo_cli.modeling.sizes import NOTHING_GATHERED, Gathered, Sizes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dpo_cli.modeling.held import Held

_REDUCED = 4
"""The bytes of a number of a gradient while it is exchanged: it is averaged in float32."""

_OUTSIDE = -1
"""The layer of what is in no decoder layer."""


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        count: Over how many processes.
    """

    count: int

    def part(self, weights: Tensor) -> Tensor:
        """Return what the first process holds of a weight, without content."""
        first, *others = weights.shape or (1,)
        return torch.empty(math.ceil(first / self.count), *others, dtype=weights.dtype, device="meta")

    def padded(self, weights: Tensor) -> int:
        """Return the numbers of a weight that is gathered, with the padding of its last rows."""
        return self.count * self.part(weights).numel()


@dataclass(frozen=True)
class Weight:
    """A weight of a model, as it is where no process shares it.

    Attributes:
        values: It, maybe without content, in the dtype that is held.
        layer: The decoder layer that it is in, counted from 0; below 0: none.
        trains: Whether it does.
        bits: Of one that is held in few bits, the bytes of these, and those of their scales, which are not sharded.
        rounded_to: What it is rounded to where it is gathered; None: it is gathered as it is held.
    """

    values: Tensor
    layer: int
    trains: bool
    bits: tuple[int, int] | None = None
    rounded_to: torch.dtype | None = None

    def held(self, shards: Sharding) -> int:
        """Return the bytes that a process holds of it."""
        if self.bits is None:
            return shards.part(self.values).nbytes
        few, scales = self.bits
        return math.ceil(few / shards.count) + scales

    def gathered(self, shards: Sharding) -> int:
        """Return the bytes that it takes while it is whole."""
        return shards.padded(self.values) * self.gathered_as.itemsize if self.bits is None else self.bits[0]

    @property
    def gathered_as(self) -> torch.dtype:
        """The dtype of it, and of its gradient, while it is whole."""
        return self.rounded_to or self.values.dtype


def layer_of(model: nn.Module) -> dict[int, int]:
    """Return in which decoder layer each weight is, by its identity; of the others nothing."""
    layers = enumerate(decoder_layers(model))
    return {id(weights): number for number, layer in layers for weights in layer.parameters()}


def whole_weights(model: PreTrainedModel, held: Held) -> list[Weight]:
    """Return the weights of a model as processes share them, which may have no content."""
    layers, bits, rounded_to = layer_of(model), held.bits_of(model), held.gathered_as()

    def shared(values: Tensor) -> Tensor:
        # What is rounded where it is made whole has more bits where it is not.
        return torch.empty_like(values, dtype=held.on_shards().torch_dtype, device="meta") if rounded_to else values

    return [
        Weight(shared(one), layers.get(id(one), _OUTSIDE), one.requires_grad, bits.get(id(one)), rounded_to)
        for one in model.parameters()
    ]


def sizes_of_rank(
    weights: Sequence[Weight], moved: Iterable[Tensor], held: Held, shards: Sharding, numbers: int, *, beginning: bool
) -> Sizes:
    """Return what one process holds.

    Args:
        weights: All weights.
        moved: Those that training moves.
        held: How they are held.
        shards: How they are sharded.
        numbers: How many numbers they are.
        beginning: Whether what trains is there once more, to answer as before step 1.
    """
    trained = [one.values for one in weights if one.trains]
    parts = [shards.part(values) for values in trained]
    return Sizes(
        numbers=numbers,
        held=sum(one.held(shards) for one in weights),
        present=0,
        num_trained=sum(values.numel() for values in trained),
        trained=sum(part.nbytes for part in parts),
        saved=held.saved_bytes([shards.part(values) for values in moved]),
        gathered=gathered(weights, shards),
        beginning=sum(part.nbytes for part in parts) * beginning,
    )


def gathered(weights: Sequence[Weight], shards: Sharding) -> Gathered:
    """Return what a process gathers for a time.

    A layer's backward pass has its weights, the next layer's on their way, its gradients in the dtype of these, and
    those of the layer before in the buffer that they are exchanged in, until they have arrived.
    """
    if shards.count == 1:
        return NOTHING_GATHERED
    numbers = max((one.layer for one in weights), default=_OUTSIDE) + 1
    whole, gradients, exchanged = ([0] * (numbers + 1) for _ in range(3))
    for one in weights:
        # The last place is that of what is in no layer.
        whole[one.layer] += one.gathered(shards)
        trained = shards.padded(one.values) * one.trains
        gradients[one.layer] += trained * one.gathered_as.itemsize
        exchanged[one.layer] += trained * math.ceil(_REDUCED * (1 + 1 / shards.count))
    *layers, root = whole
    *both, ending = map(sum, zip(gradients, exchanged, strict=True))
    two = max((first + second for first, second in itertools.pairwise([*layers, 0])), default=0)
    return Gathered(root, two + max(both, default=0) + gradients[-1], ending)


def present_share(model: nn.Module) -> float:
    """Return the share of a model's weights that is in this process's memory."""
    parameters = list(model.parameters())
    if any(weights.is_meta for weights in parameters):
        return 0.0
    here = sum(local(weights).numel() for weights in parameters if not is_placeholder(weights))
    return here / max(1, sum(weights.numel() for weights in parameters))
