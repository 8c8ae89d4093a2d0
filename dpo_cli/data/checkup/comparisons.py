"""What is looked for by comparing the digests of pairs; `COMPARISONS` at the end lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.findings import Check, FlaggedCheck
from dpo_cli.data.pairs.text_checks import TEXT_CHECKS
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS

if TYPE_CHECKING:
    # `data.drop` is checked by this table, before Arrow is needed.
    from dpo_cli.data.prepared.folder import PreparedPairs

Indices: TypeAlias = NDArray[np.int64]
"""Places of pairs in the prepared data, `[found]`."""


@dataclass(frozen=True, slots=True)
class Found:
    """Pairs with a finding.

    Attributes:
        indices: Which they are, ascending.
        others: For each of them the pair that it was compared with; None where a pair is found by itself.
    """

    indices: Indices
    others: Indices | None = None

    def among(self, indices: Indices) -> Found:
        """Return those of them that are among some pairs."""
        inside = np.isin(self.indices, indices)
        return Found(self.indices[inside], None if self.others is None else self.others[inside])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Check):
    """Something to find by comparing pairs.

    Attributes:
        find: Finds it among all pairs, of which these are trained on and those are held out.
    """

    find: Callable[[PreparedPairs, Indices, Indices], Found]


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


COMPARISONS = (
    Comparison(
        "leakage",
        "error",
        "the prompt is also held out",
        "The prompt of a training pair is also held out: the held-out figures will be too good.",
        "Leave these pairs out of training: `data.drop: [leakage]`.",
        when=(
            "the prompt of a training pair is also held out. A fraction in `data.eval` never splits a prompt; a "
            "separate source may"
        ),
        droppable=True,
        find=_leakage,
    ),
    Comparison(
        "conflicts",
        "warning",
        "another pair prefers the response that this one rejects",
        "Another pair has the same prompt and prefers the response that this one rejects: together they teach nothing.",
        "Decide which of them is right, or leave both out: `data.drop: [conflicts]`.",
        when="another pair, on either side, has the same prompt and the same two responses, swapped",
        droppable=True,
        find=_conflicts,
    ),
    Comparison(
        "duplicates",
        "warning",
        "an earlier pair has the same tokens",
        "The pair has the same tokens as an earlier one, and thus counts more than the others.",
        "Keep only the first: `data.drop: [duplicates]`; to make a pair count more, set its `weight`.",
        when="the same tokens as an earlier pair of the same side, unless the weight of a source repeats the row",
        droppable=True,
        find=_duplicates,
    ),
    Comparison(
        "shared_prompts",
        "info",
        "another pair has the same prompt",
        "Another pair has the same prompt with another response, as is usual if several answers were ranked.",
        "Nothing to do: a split by `data.eval` keeps all pairs of a prompt on one side.",
        when="another pair has the same prompt and other responses; the same two swapped are a conflict",
        find=_shared_prompts,
    ),
)
"""All that is looked for."""

PAIR_CHECKS: tuple[Comparison | FlaggedCheck, ...] = (*COMPARISONS, *TEXT_CHECKS, *TOKEN_CHECKS)
"""All checks that pairs can have as a finding."""

DROPPABLE = tuple(check.name for check in PAIR_CHECKS if check.droppable)
"""The findings whose pairs `data.drop` can leave out."""
