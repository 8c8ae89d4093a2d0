"""FlexAttention's block mask of a prefix tree, in NumPy: no comparison of every token with every other is made."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_cli.modeling.attention.kernels import BLOCK_TOKENS
from dpo_cli.modeling.tree import PrefixTree


class BlockIndices(NamedTuple):
    """The blocks of keys that each block of queries sees, and the other way round; B blocks a row.

    Numbers are `[1, 1, B]`, places `[1, 1, B, B]`: those of a row come first, and what follows them is never read.

    Attributes:
        kv_num: How many blocks of keys a block of queries sees in part.
        kv: Which ones.
        full_kv_num: How many it sees whole.
        full_kv: Which ones.
        q_num: How many blocks of queries see a block of keys in part.
        q: Which ones.
        full_q_num: How many see it whole.
        full_q: Which ones.
    """

    kv_num: NDArray[np.int32]
    kv: NDArray[np.int32]
    full_kv_num: NDArray[np.int32]
    full_kv: NDArray[np.int32]
    q_num: NDArray[np.int32]
    q: NDArray[np.int32]
    full_q_num: NDArray[np.int32]
    full_q: NDArray[np.int32]


def block_indices(tree: PrefixTree, window: int | None) -> BlockIndices:
    """Return the blocks of a tree whose row is a multiple of a block.

    A block counts as seen in part where it may be; as seen whole only where every token of it is.
    """
    part, full = _seen_blocks(tree, window)
    return BlockIndices(*_listed(part), *_listed(full), *_listed(part.T), *_listed(full.T))


def rule_numbers(tree: PrefixTree, window: int | None) -> list[NDArray[np.int32]]:
    """Return what the rule within a block asks of each token, `[T]`: see `flex.sees`.

    These are the place behind the last token that sees it and, with a window, its depth and the least depth that it
    sees. A window is no number of the rule's own: a kernel would be compiled for each.
    """
    ends = tree.ends.astype(np.int32)
    if window is None:
        return [ends]
    return [ends, tree.depths.astype(np.int32), (tree.depths - window + 1).astype(np.int32)]


def _seen_blocks(tree: PrefixTree, window: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which blocks of keys each block of queries sees in part, and which whole, `[B, B]` each."""
    ends, depths = (numbers.reshape(-1, BLOCK_TOKENS) for numbers in (tree.ends, tree.depths))
    starts = np.arange(len(ends)) * BLOCK_TOKENS
    before = starts[:, None] > starts
    some = (before & (ends.max(1) > starts[:, None])) | (starts[:, None] == starts)
    full = before & (ends.min(1) >= starts[:, None] + BLOCK_TOKENS)
    if window is not None:
        # The nearest two tokens may see each other; all do where the two farthest do.
        some &= depths.min(1)[:, None] - depths.max(1) < window
        full &= depths.max(1)[:, None] - depths.min(1) < window
    return some & ~full, full


def _listed(blocks: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return how many blocks of each row are marked, and their places, ascending, before those of the others."""
    places = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(1).astype(np.int32)[None, None], places.astype(np.int32)[None, None]
