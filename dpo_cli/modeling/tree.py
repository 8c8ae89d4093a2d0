"""Sequences that begin alike become one row in which every token stands once: a prefix tree, written depth first.

In that order the tokens that follow a token, in whatever sequence, stand together right behind it: it is seen
from its own place up to its `end`. Which token sees which is thereby said in one number a token:

    i sees j  where  j ≤ i < ends[j]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.tokens.encoding import common_beginning

_BRANCH_TOKENS = 4
"""The fewest tokens that are worth a branch of their own: each branch costs every layer one more piece of attention."""


@dataclass(frozen=True)
class PrefixTree:
    """T tokens of several sequences, each once.

    Attributes:
        tokens: `[T]`, token ids.
        depths: `[T]`, each token's position in the sequences that it belongs to.
        ends: `[T]`, the place behind the last token that sees it.
        places: For each sequence, where its tokens stand, `[its length]`.
    """

    tokens: NDArray[np.int64]
    depths: NDArray[np.int64]
    ends: NDArray[np.int64]
    places: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens without a branch among them.

    Attributes:
        start: Place of the first token.
        stop: Place behind the last.
        depth: The first token's position in its sequences.
        path: The stretches before it that all of its tokens see, from the root on, by number; together they are as
            long as it is deep.
    """

    start: int
    stop: int
    depth: int
    path: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def end(self) -> int:
        """The position behind that of the last token."""
        return self.depth + len(self)


def grow(sequences: Sequence[NDArray[np.int32]]) -> PrefixTree:
    """Lay out sequences as a prefix tree; beginnings too short to be worth a branch are written again."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
    places: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(sequences)
    ends = np.zeros(sum(map(len, sequences)), np.int64)
    tokens, depths, size = [], [], 0
    before, place, branches = np.empty(0, np.int32), np.empty(0, np.int64), [0]
    for i in order:
        sequence = sequences[i]
        shared = _worth_sharing(common_beginning(before, sequence), branches)
        ends[place[shared:]] = size
        place = np.concatenate([place[:shared], np.arange(size, size + len(sequence) - shared)])
        tokens.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        size += len(sequence) - shared
        before, places[i] = sequence, place
    ends[place] = size
    return PrefixTree(np.concatenate(tokens).astype(np.int64), np.concatenate(depths), ends[:size], tuple(places))


def padded(tree: PrefixTree, num_tokens: int) -> PrefixTree:
    """Return a tree of so many tokens; those behind its own see themselves alone and are seen by no other."""
    size, added = len(tree.tokens), num_tokens - len(tree.tokens)
    nothing = np.zeros(added, np.int64)
    tokens, depths = np.concatenate([tree.tokens, nothing]), np.concatenate([tree.depths, nothing])
    ends = np.concatenate([tree.ends, np.arange(size, num_tokens) + 1])
    return PrefixTree(tokens, depths, ends, tree.places)


def stretches(tree: PrefixTree) -> tuple[Stretch, ...]:
    """Cut a tree where it branches, so that attention can go piece by piece."""
    depths, ends = tree.depths, tree.ends
    starts = np.flatnonzero(np.r_[True, (np.diff(ends) != 0) | (np.diff(depths) != 1)])
    found: list[Stretch] = []
    path: list[int] = []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(ends)], strict=True):
        while path and ends[found[path[-1]].start] <= start:
            path.pop()
        found.append(Stretch(start, stop, int(depths[start]), tuple(path)))
        path.append(len(found) - 1)
    return tuple(found)


def _worth_sharing(shared: int, branches: list[int]) -> int:
    """Return how much of a common beginning is shared; `branches`, kept up to date, are the path's branching depths."""
    while branches[-1] > shared:
        branches.pop()
    if shared - branches[-1] >= _BRANCH_TOKENS:
        branches.append(shared)
    return branches[-1]
