"""What is measured of prepared pairs as a whole: their lengths, what these give away, how prompts and responses end."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.checkup.comparisons import Indices
from dpo_cli.data.checkup.intervals import wilson_interval
from dpo_cli.data.checkup.report import Boundary, Cut, LengthBias, Lengths, Margins
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.tally import MEASURED

Statistics = Mapping[str, Any]
"""What the manifest of a prepared folder says of the reading."""

PARTS = ("prompt", "chosen", "rejected")

_BINS, _PLANE_BINS = 40, 24
"""How many bins the longest text or response is to be cut into, at most."""

_BEYOND = 0.01
"""The share of pairs that may be longer than a histogram reaches: they are in its last bin."""

_LENGTHS_TRIED = (512, 1024, 2048)

_ENDING_TOKENS, _ENDINGS = 6, 3
"""Tokens among which the template's are looked for at an end, and how many endings are shown."""

_END_WITHIN = 8
"""Tokens at the end of a response among which its end token must be."""


def length_bias(pairs: PreparedPairs, indices: Indices) -> LengthBias:
    """Measure how often the chosen response is the longer one."""
    difference = pairs.sizes.chosen[indices] - pairs.sizes.rejected[indices]
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    equal = len(indices) - longer - shorter
    accuracy = (longer + equal / 2) / len(indices)
    return LengthBias(longer, equal, shorter, accuracy, wilson_interval(accuracy, len(indices)))


def lengths(pairs: PreparedPairs, indices: Indices, read: Iterable[Statistics], max_length: int) -> Lengths:
    """Measure how long the pairs are, those that were dropped as too long too, and what a length rule would cut."""
    sizes = pairs.sizes
    kept = {
        "prompt": sizes.prompts[indices],
        "chosen": sizes.chosen[indices],
        "rejected": sizes.rejected[indices],
        "longest": sizes.longest[indices],
    }
    dropped = _too_long(read)
    longest, every = int(kept["longest"].max()), dropped["longest"].sum()
    # A few that are far longer than all others would leave no room for these.
    most = max(longest, dropped["longest"].most_but(_BEYOND * (len(indices) + every)))
    width = _round_width(most, _BINS)
    num_bins = most // width + 1
    plane_width, plane = _plane(kept["chosen"], kept["rejected"])
    return Lengths(
        bin_tokens=width,
        open_ended=any(int(lengths.values.max(initial=0)) // width >= num_bins for lengths in dropped.values()),
        histograms={name: _binned(column, None, width, num_bins) for name, column in kept.items()},
        too_long={name: _binned(*lengths, width, num_bins) for name, lengths in dropped.items()} if every else {},
        plane_tokens=plane_width,
        plane=plane,
        cuts=tuple(
            Cut(tried, int((pairs.uncut[indices] > tried).sum()) + dropped["longest"].beyond(tried))
            for tried in sorted({*_LENGTHS_TRIED, max_length})
        ),
    )


def margins(pairs: PreparedPairs, indices: Indices, *, used: bool) -> Margins | None:
    """Measure the margins of those pairs that have one."""
    found = pairs.margins[indices]
    found = found[found != 0]
    if not len(found):
        return None
    return Margins(used, len(found), float(found.min()), float(np.median(found)), float(found.max()))


def boundary(pairs: PreparedPairs, indices: Indices, tokenizer: Any) -> Boundary:
    """Count the template's tokens at the ends of prompts and responses.

    Args:
        pairs: All pairs.
        indices: Those that are looked at.
        tokenizer: Knows which token begins a text and which one ends it, and how tokens are written.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    heads = pairs.heads("prompt", 2)[indices]
    with_bos = (heads == bos) if bos is not None else np.zeros_like(heads, bool)
    without_eos = {
        name: int((pairs.tails(name, _END_WITHIN)[indices] != eos).all(axis=1).sum())
        for name in ("chosen", "rejected")
        if eos is not None
    }
    return Boundary(
        bos=tokenizer.bos_token or "",
        starting_with_bos=int(with_bos[:, 0].sum()),
        starting_with_two=int(with_bos.all(axis=1).sum()),
        eos=tokenizer.eos_token or "",
        without_eos=without_eos,
        endings={name: _endings(pairs.tails(name, _ENDING_TOKENS)[indices], tokenizer) for name in PARTS},
    )


class _Counted(NamedTuple):
    """Lengths, ascending, and how many pairs have each."""

    values: Indices
    counts: Indices

    def sum(self) -> int:
        """Count the pairs."""
        return int(self.counts.sum())

    def beyond(self, length: int) -> int:
        """Count the pairs that are longer."""
        return int(self.counts[self.values > length].sum())

    def most_but(self, few: float) -> int:
        """Return the length that no more than a few pairs exceed, or 0."""
        beyond = self.sum() - np.cumsum(self.counts)
        return 0 if self.sum() <= few else int(self.values[beyond <= few][0])


def _too_long(read: Iterable[Statistics]) -> dict[str, _Counted]:
    """Return the lengths of the pairs that were dropped as too long."""
    found: dict[str, Counter[int]] = {name: Counter() for name in MEASURED}
    for part, name in itertools.product(read, MEASURED):
        found[name].update(dict(part["too_long"][name]))
    return {
        name: _Counted(*(np.array(column, np.int64) for column in zip(*sorted(counter.items()), strict=True)))
        if counter
        else _Counted(np.empty(0, np.int64), np.empty(0, np.int64))
        for name, counter in found.items()
    }


def _binned(lengths: Indices, counts: Indices | None, width: int, num_bins: int) -> tuple[int, ...]:
    """Count lengths by bins; what is longer than all of them is in the last one."""
    bins = np.minimum(lengths // width, num_bins - 1)
    return tuple(np.bincount(bins, counts, minlength=num_bins).astype(int).tolist())


def _endings(tails: NDArray[np.int32], tokenizer: Any) -> tuple[tuple[str, int], ...]:
    """Return the most frequent endings from their first special token on, as text, and how many there are of each."""
    special = np.isin(tails, tokenizer.all_special_ids)
    # Without any it is the last token that is shown.
    special[:, -1] = True
    tails = np.where(np.logical_or.accumulate(special, axis=1), tails, np.int32(-1))
    # A number for each row: those of different rows are equal but by a freak of chance.
    numbers = np.zeros(len(tails), np.uint64)
    for column in tails.T:
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64)
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    most = np.lexsort((first, -counts))[:_ENDINGS]
    return tuple(
        (str(tokenizer.decode([token for token in tails[first[i]].tolist() if token >= 0])), int(counts[i]))
        for i in most
    )


def _plane(chosen: Indices, rejected: Indices) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Count pairs by the bins of both responses' lengths; return the width of a bin, and the bins that have pairs."""
    longest = int(max(chosen.max(), rejected.max()))
    width = _round_width(longest, _PLANE_BINS)
    side = longest // width + 1
    cells, counts = np.unique(chosen // width * side + rejected // width, return_counts=True)
    return width, tuple(zip((cells // side).tolist(), (cells % side).tolist(), counts.tolist(), strict=True))


def _round_width(longest: int, most: int) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … by which a length is cut into so many bins at most."""
    unit = 1
    while True:
        for width in (unit, 2 * unit, 5 * unit):
            if longest // width < most:
                return width
        unit *= 10
