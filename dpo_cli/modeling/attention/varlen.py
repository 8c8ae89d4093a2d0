"""Attention over a prefix tree with FlashAttention for sequences of different lengths, which needs no compiler.

Each piece of the tree is a sequence: its queries are those of the row, and its keys, gathered, those that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dpo_cli.modeling.attention.gathering import num_keys
from dpo_cli.modeling.attention.trees import CannotPack
from dpo_cli.modeling.tree import Stretch

_COMPUTED_IN = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VarlenMask:
    """The mask of all layers of one kind.

    Attributes:
        keys: The places in the row of all keys, `[K]`, piece after piece.
        query_starts: `[S + 1]`, where the queries of each piece begin.
        key_starts: `[S + 1]`, where the keys of each piece begin.
        most_queries: Those of the longest piece.
        most_keys: The most that a piece sees.
        window: The most tokens that a token sees, itself included, or None.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    window: int | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
        """Attend, as `tree_attention` says.

        Raises:
            CannotPack: The kernel does not do it: soft caps, values of another width, precisions of 32 bits.
        """
        _refuse(query, value, softcap)
        queries, keys, values = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
        call: Callable[..., Any] = varlen_attn
        attended: Tensor = call(
            queries,
            keys.index_select(0, self.keys),
            values.index_select(0, self.keys),
            self.query_starts,
            self.key_starts,
            self.most_queries,
            self.most_keys,
            scale=scaling,
            # How many tokens before its own and behind it a query sees; the last ones of both stand side by side.
            window_size=(-1 if self.window is None else self.window - 1, 0),
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        return attended[None]


def varlen_mask(stretches: Sequence[Stretch], window: int | None, indices: Sequence[Tensor]) -> VarlenMask:
    """Make a mask of what `gathering.gathered_keys` computed."""
    keys, query_starts, key_starts = indices
    most_queries, most_keys = (max(sizes) for sizes in _sizes(stretches, window))
    return VarlenMask(keys, query_starts, key_starts, most_queries, most_keys, window)


def _sizes(stretches: Sequence[Stretch], window: int | None) -> tuple[list[int], list[int]]:
    """Return how many queries and how many keys each piece has."""
    return [len(stretch) for stretch in stretches], [num_keys(stretch, window) for stretch in stretches]


def _refuse(query: Tensor, value: Tensor, softcap: float | None) -> None:
    """Refuse what FlashAttention does not do."""
    if softcap is not None:
        raise CannotPack("its scores have a soft cap, which varlen attention does not know")
    if value.shape[-1] != query.shape[-1]:
        raise CannotPack("its values are of another width than its keys, which varlen attention does not know")
    if value.dtype not in _COMPUTED_IN:
        precision = str(value.dtype).removeprefix("torch.")
        raise CannotPack(f"varlen attention computes in 16 bits alone, and the run in {precision}")
