"""Where the scored tokens of a batch are: found out on the CPU while it is laid out, so that no device is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Which hidden states predict N tokens. Where several tokens have one in common, it is named once.

    Attributes:
        states: `[n]`, the positions of these hidden states, ascending.
        rows: `[N]`, for each token, the place in `states` of the one that predicts it.
        by_row: `[N]`, the tokens' places in `rows`, those of the first hidden state first.
        edges: `[n + 1]`, on the CPU: where each hidden state's tokens begin in `by_row`, and the end.
    """

    states: Tensor
    rows: Tensor
    by_row: Tensor
    edges: NDArray[np.int64]

    @classmethod
    def of(cls, positions: NDArray[np.int64]) -> Predictions:
        """Take the positions, `[N]`, of the hidden state that predicts each token."""
        states, rows = np.unique(positions, return_inverse=True)
        rows = rows.reshape(-1)
        edges = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(states)))])
        by_row = np.argsort(rows, kind="stable")
        return cls(torch.from_numpy(states), torch.from_numpy(rows), torch.from_numpy(by_row), edges)

    @property
    def positions(self) -> Tensor:
        """The position of the hidden state that predicts each token, `[N]`."""
        return self.states[self.rows]

    def chunks(self, num_rows: int) -> list[tuple[slice, Tensor]]:
        """Cut the hidden states into chunks of at most `num_rows`; name the tokens that each chunk predicts."""
        starts = range(0, len(self.states), num_rows)
        chunks = [slice(start, min(start + num_rows, len(self.states))) for start in starts]
        return [(chunk, self.by_row[self.edges[chunk.start] : self.edges[chunk.stop]]) for chunk in chunks]


@dataclass(frozen=True)
class Responses:
    """Which of N tokens belong to which of 2B responses: the chosen ones of all pairs, then their rejected ones.

    Attributes:
        lengths: Tokens of each response, `2B` of them.
        counts: `[2B]`, the same as a tensor.
        places: `[N]`, where each token is in a table with a row for each response, as wide as the longest.
        beyond: `[N]`, whether a token is beyond the length of its pair's shorter response.
    """

    lengths: tuple[int, ...]
    counts: Tensor
    places: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Responses:
        """Take the lengths of all chosen, then of all rejected responses."""
        counts = np.array(lengths, np.int64)
        responses = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(responses)) - (np.cumsum(counts) - counts)[responses]
        shorter = np.tile(counts.reshape(2, -1).min(0), 2)
        return cls(
            tuple(map(int, lengths)),
            torch.from_numpy(counts),
            torch.from_numpy(places + responses * counts.max()),
            torch.from_numpy(places >= shorter[responses]),
        )

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.lengths) // 2

    def sums(self, values: Tensor) -> Tensor:
        """Add up `[N]` values over each response, `[2B]`, in an order that is always the same."""
        if values.device.type == "cpu":
            # Other orders of additions would be faster by nothing that counts, and give other bits.
            return torch.stack([part.sum() for part in values.split(list(self.lengths))])
        return self.sums_at_once(values)

    def sums_at_once(self, values: Tensor) -> Tensor:
        """Add up as `sums` does, in as many kernels for many responses as for one."""
        width = max(self.lengths)
        table = put(values.new_zeros(len(self.lengths) * width), self.places, values)
        return table.view(-1, width).sum(1)


def put(total: Tensor, places: Tensor, values: Tensor, *, added: bool = False) -> Tensor:
    """Put values at places of a tensor, or add them to what is there, in place; all places are within it.

    On a GPU torch's deterministic way to do so would wait for the device to look whether they are.
    """
    if total.device.type != "cpu":
        return torch._index_put_impl_(total, [places], values, added, True)
    return total.index_add_(0, places, values) if added else total.index_copy_(0, places, values)


def taken(whole: Tensor, places: Tensor) -> Tensor:
    """Return the rows of a tensor at places, each named once, with a gradient for which no GPU is waited for."""
    # The gradient of this one alone adds up without a look at the places.
    return whole.index_select(0, places) if whole.device.type == "cpu" else whole[places]
