"""Attention over a prefix tree with FlexAttention, compiled once for rows of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_cli.modeling.attention.blocks import BlockIndices
from dpo_cli.modeling.attention.kernels import BLOCK_TOKENS
from dpo_cli.modeling.compiled import hardened

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Tells, of batch, head, query and key, whether the query sees the key."""


@dataclass(frozen=True)
class FlexMask:
    """The mask of all layers of one kind.

    Attributes:
        blocks: The blocks in which anything is seen, and the tree's rule.
    """

    blocks: BlockMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
        """Attend, as `tree_attention` says."""
        # Under autocast rotated queries and keys are float32 again, and FlexAttention wants one type.
        query, key = query.to(value.dtype), key.to(value.dtype)
        # Within a compiled layer it is part of the layer's own graph.
        call: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex(value.dtype)
        attended: Tensor = call(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped(softcap),
            block_mask=self.blocks,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).contiguous()


def flex_mask(indices: Sequence[Tensor]) -> FlexMask:
    """Make a mask of what `blocks.block_indices` and `blocks.rule_numbers` computed, without looking into it."""
    listed = BlockIndices._fields
    named: dict[str, Any] = dict(zip(listed, indices, strict=False))
    numbers = indices[len(listed) :]
    blocks = BlockMask(
        seq_lengths=(len(numbers[0]), len(numbers[0])),
        kv_num_blocks=named["kv_num"],
        kv_indices=named["kv"],
        full_kv_num_blocks=named["full_kv_num"],
        full_kv_indices=named["full_kv"],
        q_num_blocks=named["q_num"],
        q_indices=named["q"],
        full_q_num_blocks=named["full_q_num"],
        full_q_indices=named["full_q"],
        BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
        mask_mod=sees(*numbers),
    )
    return FlexMask(blocks)


def sees(ends: Tensor, depths: Tensor | None = None, least_depths: Tensor | None = None) -> Rule:
    """Return the rule of a tree, from the numbers that `blocks.rule_numbers` computed: whether `q` sees `k`."""
    if depths is None or least_depths is None:

        def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < ends[k])

        return seen

    def seen_in_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k]) & (depths[k] >= least_depths[q])

    return seen_in_window


def capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return what bends a score so that it stays below a cap."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def flex_for(dtype: torch.dtype) -> FunctionType:
    """Return FlexAttention as a function of its own for a dtype: torch limits how often it compiles a function.

    In a run of a lower precision, proofs compute in float32 before.
    """
    code = flex_attention.__code__.replace(co_name=f"{flex_attention.__name__} in {dtype}")
    own = FunctionType(code, flex_attention.__globals__, argdefs=flex_attention.__defaults__)
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return own


@functools.cache
def compiled_flex(dtype: torch.dtype, backend: str = "inductor") -> Callable[..., Tensor]:
    """Return FlexAttention in a dtype, compiled for any number of tokens; made once, so that it is compiled once.

    The whole is one graph: where it could not be, or would be compiled too often, an error is raised. What torch does
    otherwise, without a word, is to compute the scores of every token with every other.
    """
    return hardened(torch.compile(flex_for(dtype), dynamic=True, fullgraph=True, backend=backend), "FlexAttention")
