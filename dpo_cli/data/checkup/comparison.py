"""Pairs that stand in each other's way: found by comparing digests, and left out of a run where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.findings import Droppable, Kind
from dpo_cli.data.pairs.inspection import NOTICED
from dpo_cli.data.prepared.columns import FLAGS
from dpo_cli.data.prepared.folder import PreparedPairs

Indices = NDArray[np.int64]
"""Places of pairs in the prepared data, `[found]`."""


@dataclass(frozen=True, slots=True)
class Found:
    """Pairs with a finding.

    Attributes:
        indices: Which they are, ascending.
        others: For each of them a pair that it stands against; None where a pair is found by itself.
    """

    indices: Indices
    others: Indices | None = None

    def among(self, indices: Indices) -> Found:
        """Return those of them that are among some pairs."""
        inside = np.isin(self.indices, indices)
        return Found(self.indices[inside], None if self.others is None else self.others[inside])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Something to find by comparing pairs.

    Attributes:
        kind: What it is called, what it means, what to do about it.
        find: Finds it among all pairs, of which these are trained on and those are held out.
    """

    kind: Kind
    find: Callable[[PreparedPairs, Indices, Indices], Found]


def find(name: str, pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the pairs of one of `COMPARED`, `NOTICED` or `FLAGS`."""
    for comparison in COMPARED:
        if comparison.kind.name == name:
            return comparison.find(pairs, train, held_out)
    indices = np.sort(np.concatenate([train, held_out]))
    return Found(indices[pairs.flags[indices] & np.uint32(_MASKS[name]) > 0])


def without_copies(pairs: PreparedPairs, indices: Indices) -> Indices:
    """Return some pairs without those that are there only because a source's weight repeats their row.

    Copies stand beside each other and were read at the same place. What was read there again later, of a file that
    was named twice for instance, is none.

    Args:
        pairs: All pairs.
        indices: Some of them, ascending.
    """
    runs, keys = pairs.origin_runs()[indices], pairs.key_numbers("key")[indices]
    order = np.lexsort((keys, runs))
    runs, keys = runs[order], keys[order]
    again = (runs[1:] == runs[:-1]) & (keys[1:] == keys[:-1])
    return np.delete(indices, order[1:][again])


def drops(pairs: PreparedPairs, train: Indices, held_out: Indices, names: Sequence[Droppable]) -> dict[str, Indices]:
    """Return the pairs that a run leaves out, by the finding that they are left out for.

    A pair with several findings stands under the first name. What a finding is does not depend on what another
    name leaves out.

    Args:
        pairs: All pairs.
        train: Those to be trained on.
        held_out: Those to be held out.
        names: The findings whose pairs are left out.
    """
    left_out: dict[str, Indices] = {}
    gone: Indices = np.empty(0, np.int64)
    for name in dict.fromkeys(names):
        indices = find(name, pairs, train, held_out).indices
        left_out[name] = np.setdiff1d(indices, gone)
        gone = np.union1d(gone, indices)
    return left_out


def _duplicates(pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the pairs that repeat an earlier one of their side; what both sides have is leakage."""
    sides = [_repeated(pairs, side) for side in (train, held_out)]
    indices, others = (np.concatenate(part) for part in zip(*sides, strict=True))
    order = np.argsort(indices)
    return Found(indices[order], others[order])


def _repeated(pairs: PreparedPairs, side: Indices) -> tuple[Indices, Indices]:
    """Return the pairs that repeat an earlier one and are no copies of it, and the earlier ones."""
    _, first, group = np.unique(pairs.key_numbers("key")[side], return_index=True, return_inverse=True)
    earlier = first[group]
    later = np.flatnonzero(earlier != np.arange(len(side)))
    # A source's weight may repeat a row: what was read with the first one is meant to be there.
    runs = pairs.origin_runs()[side]
    found = later[runs[later] != runs[earlier[later]]]
    return side[found], side[earlier[found]]


def _conflicts(pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the pairs of which another prefers what they reject."""
    return _unlike(pairs, np.concatenate([train, held_out]), "either_key", "key")


def _shared_prompts(pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the pairs whose prompt another pair has with other responses."""
    return _unlike(pairs, np.concatenate([train, held_out]), "prompt_key", "either_key")


def _unlike(pairs: PreparedPairs, indices: Indices, alike: str, unlike: str) -> Found:
    """Find the pairs that are alike by one digest and not by another; of those that differ, name the first."""
    groups, keys = pairs.key_numbers(alike)[indices], pairs.key_numbers(unlike)[indices]
    order = np.lexsort((indices, keys, groups))
    groups, keys = groups[order], keys[order]
    new_group = np.append(True, groups[1:] != groups[:-1])
    new_key = np.append(True, keys[1:] != keys[:-1]) | new_group
    # A group is told by the key it begins with and the one it ends with: both are shown by the first pair of theirs.
    key_starts = np.maximum.accumulate(np.where(new_key, np.arange(len(order)), 0))
    starts = np.flatnonzero(new_group)
    ends = np.append(starts[1:], len(order)) - 1
    group = np.cumsum(new_group) - 1
    lowest, highest = starts[group], key_starts[ends[group]]
    others = np.where(keys == keys[lowest], highest, lowest)
    differing = lowest != highest
    found, others = indices[order[differing]], indices[order[others[differing]]]
    ascending = np.argsort(found)
    return Found(found[ascending], others[ascending])


def _leakage(pairs: PreparedPairs, train: Indices, held_out: Indices) -> Found:
    """Find the training pairs whose prompt is held out."""
    if not len(held_out):
        return Found(held_out, held_out)
    keys = pairs.key_numbers("prompt_key")
    known, first = np.unique(keys[held_out], return_index=True)
    places = np.minimum(np.searchsorted(known, keys[train]), len(known) - 1)
    leaks = known[places] == keys[train]
    return Found(train[leaks], held_out[first[places[leaks]]])


_MASKS = {notice.kind.name: 1 << bit for bit, notice in enumerate(NOTICED)} | FLAGS
"""The bit of the flags that stands for each finding of a pair by itself."""

COMPARED = (
    Comparison(
        Kind(
            "leakage",
            "error",
            "the prompt is held out too",
            "The prompt of a training pair is held out too: the held-out figures will be better than they should.",
            "Leave these pairs out of the training: `data.drop: [leakage]`.",
        ),
        _leakage,
    ),
    Comparison(
        Kind(
            "conflicts",
            "warning",
            "another pair prefers the response that this one rejects",
            "Another pair has the same prompt and prefers the response that this one rejects: together they teach "
            "nothing.",
            "Decide which of them is right, or leave both out: `data.drop: [conflicts]`.",
        ),
        _conflicts,
    ),
    Comparison(
        Kind(
            "duplicates",
            "warning",
            "an earlier pair has the same tokens",
            "The pair repeats an earlier one token by token, and counts that much more than the others.",
            "Leave all but the first out: `data.drop: [duplicates]`; to have a pair count more, give it a `weight`.",
        ),
        _duplicates,
    ),
    Comparison(
        Kind(
            "shared_prompts",
            "info",
            "another pair has the same prompt",
            "Another pair has the same prompt with another response: usual where several answers were ranked.",
            "Nothing to do: a split by `data.eval` keeps all pairs of a prompt on one side.",
        ),
        _shared_prompts,
    ),
)
"""What is found by comparing pairs."""
