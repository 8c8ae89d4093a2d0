"""Attention over a prefix tree with scaled-dot-product attention, piece by piece between its branches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_cli.modeling.tree import Stretch

_BLOCK_TOKENS = 128
"""The most queries of one call: what attention computes beyond the causal triangle is half of a block's square."""

_FEWEST_QUERIES = 16
"""The fewest queries that are worth a batch of their own: matrix products of fewer rows are slow."""

_PARTS = {1: 1.0, 2: 1.15, 4: 1.35}
"""Into how many batches queries may be parted, and how many times as much there is to do then."""


@dataclass(frozen=True)
class PieceMask:
    """The mask of all layers of one kind: the tree, and how far they look back.

    Attributes:
        stretches: The row in pieces without branches.
        window: The most tokens that a token sees, itself included, or None.
    """

    stretches: tuple[Stretch, ...]
    window: int | None
    _masks: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def reads(self) -> tuple[Reads, ...]:
        """What each stretch reads, as far as the window reaches."""
        return tuple(self._reads(place, stretch) for place, stretch in enumerate(self.stretches))

    def _reads(self, place: int, stretch: Stretch) -> Reads:
        seen = [i for i in stretch.path if self.stretches[i].end > self._first_key(stretch.depth)]
        start = self.stretches[seen[0]].depth if seen else stretch.depth
        starts = range(stretch.depth, stretch.end, _BLOCK_TOKENS)
        blocks = [(depth, min(depth + _BLOCK_TOKENS, stretch.end)) for depth in starts]
        ranges = [(max(start, self._first_key(depth)) - start, end - start) for depth, end in blocks]
        return Reads((*seen, place), [end - depth for depth, end in blocks], ranges)

    def _first_key(self, depth: int) -> int:
        """Return the position of the first key that the token at a position sees."""
        return 0 if self.window is None else max(0, depth - self.window + 1)

    # The pieces of every row are others: a graph of them would fit no second one.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
        """Attend, as `tree_attention` says."""
        # Split once: each piece's gradient then has its own size, where slices would fill the whole row with zeros.
        queries = iter(query.split([size for read in self.reads for size in read.sizes], dim=2))
        rows = [tensor.split([len(stretch) for stretch in self.stretches], dim=2) for tensor in (key, value)]
        attended = []
        for seen, _, ranges in self.reads:
            k, v = (torch.cat([row[i] for i in seen], dim=2) if seen[1:] else row[seen[0]] for row in rows)
            for keys, values in zip(_slices(k, ranges), _slices(v, ranges), strict=True):
                attended.append(_attend(next(queries), keys, values, self, scaling, softcap).transpose(1, 2))
        # Turned before they are joined: the row is then contiguous, which some architectures rely on.
        return torch.cat(attended, dim=1)

    def of(self, num_queries: int, num_keys: int, like: Tensor) -> Tensor | None:
        """Return the mask to add for queries that are the last of their keys, or None where nothing is hidden."""
        if num_queries == 1 and num_keys <= (self.window or num_keys):
            return None
        if (key := (like.dtype, like.device)) not in self._masks:
            self._masks[key] = self._largest(like)
        # What is hidden is told by how far from the end both stand, whatever their number.
        return self._masks[key][-num_queries:, -num_keys:]

    def _largest(self, like: Tensor) -> Tensor:
        """Return the mask of the most queries and keys of one call, made where it is used."""
        num_keys = max(stretch.end for stretch in self.stretches)
        num_queries = min(_BLOCK_TOKENS, num_keys)
        keys = torch.arange(num_keys, device=like.device)
        distance = keys[num_keys - num_queries :, None] - keys
        hidden = (distance < 0) | (distance >= (self.window or num_keys))
        return like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


class Reads(NamedTuple):
    """What the queries of a stretch read.

    Attributes:
        stretches: Those whose keys are put together, itself the last, by number.
        sizes: How many queries each call has, which is a block: at most `_BLOCK_TOKENS`.
        ranges: For each block the first of these keys that one of them sees, and the place behind the
            last.
    """

    stretches: tuple[int, ...]
    sizes: list[int]
    ranges: list[tuple[int, int]]


def _slices(keys: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Return the keys, or values, that each block of a stretch sees, without copying any."""
    if ranges == [(0, keys.shape[2])]:
        return (keys,)
    see: Callable[..., tuple[Tensor, ...]] = _Slices.apply
    return see(keys, ranges)


class _Slices(torch.autograd.Function):
    """Slices that overlap; their gradients are added up in one tensor, where torch would fill one each with zeros."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, ranges: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Take `[1, heads, T, d]` and return `[1, heads, stop - start, d]` for each range."""
        ctx.ranges, ctx.shape = ranges, keys.shape
        return tuple(keys[:, :, start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Add up."""
        whole = gradients[0].new_zeros(ctx.shape)
        for (start, stop), gradient in zip(ctx.ranges, gradients, strict=True):
            whole[:, :, start:stop] += gradient
        return whole, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: PieceMask, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attend from one block's tokens to the keys that end with their own."""
    groups = query.shape[1] // key.shape[1]
    added = mask.of(query.shape[2], key.shape[2], query)
    if softcap is None:
        may_part = query.device.type == "cpu" and groups > 1
        parts = _parts(query.shape[2], key.shape[1], torch.get_num_threads()) if may_part else 1
        if added is not None and parts > 1:
            query = query.squeeze(0).unflatten(1, (parts, -1)).transpose(0, 1)
            key, value = (tensor.expand(parts, -1, -1, -1) for tensor in (key, value))
            added = added.unflatten(0, (parts, 1, -1))
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=added, scale=scaling, enable_gqa=groups > 1
        )
        return attended if parts == 1 else attended.transpose(0, 1).flatten(1, 2)[None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if added is not None:
        scores = scores + added
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _parts(num_queries: int, num_heads: int, num_threads: int) -> int:
    """Return into how many batches queries are parted, so that threads of a CPU have more evenly to do.

    torch shares attention's backward pass out by batch and key head: of three heads two threads would take two and
    one. Each batch has its own gradients of the keys, which are then added up.

    Args:
        num_queries: Queries of a call.
        num_heads: Key heads, each for several query heads; else parting costs more than it gains.
        num_threads: Threads of the processor.
    """

    def share_of_busiest(parts: int) -> float:
        return math.ceil(parts * num_heads / num_threads) / parts * _PARTS[parts]

    possible = [n for n in _PARTS if n == 1 or (num_queries % n == 0 and num_queries >= n * _FEWEST_QUERIES)]
    return min(possible, key=share_of_busiest)
