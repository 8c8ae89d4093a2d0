"""The step plan: which pairs make up which optimizer step, cut into micro-batches, for each rank.

The plan is a pure function of lengths, seed, epoch and number of ranks. To resume is to skip its first
steps; nothing is replayed. How a step is cut decides speed and memory, never its gradient: the loop weighs
every pair by one over the pairs of its step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PairSizes:
    """Tokens of each pair, and which pairs have a prompt in common.

    Attributes:
        prompts: Tokens of each prompt, `[pairs]`.
        chosen: Tokens of each chosen response, `[pairs]`.
        rejected: Tokens of each rejected response, `[pairs]`.
        chosen_scored: Tokens of each chosen response that are scored, `[pairs]`.
        prompt_ids: `[pairs]`, equal where the prompts are, before any cut.
        opening: Tokens with which all prompts begin alike, the shortest prompt at most.
    """

    prompts: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    chosen_scored: NDArray[np.int64]
    prompt_ids: NDArray[np.int64]
    opening: int = 0

    @functools.cached_property
    def longest(self) -> NDArray[np.int64]:
        """Tokens of each pair's longer sequence, prompt included, `[pairs]`."""
        return self.prompts + np.maximum(self.chosen, self.rejected)

    @property
    def shortest(self) -> NDArray[np.int64]:
        """Tokens of each pair's shorter sequence, prompt included, `[pairs]`."""
        return self.prompts + np.minimum(self.chosen, self.rejected)

    def longest_first(self, indices: Sequence[int]) -> list[int]:
        """Sort pairs by their longer sequence, the longest first, and those of one length by their index."""
        return _longest_first(indices, self.longest)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The pairs of one forward pass.

    Attributes:
        pairs: Their indices in the data.
        filler: Whether they only keep this rank in step with the others, and count for nothing.
    """

    pairs: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as one rank sees it.

    Attributes:
        number: Counted from 1 over the whole run.
        epoch: Passes over the data completed after this step.
        num_pairs: Pairs of the step over all ranks.
        pairs: All their indices, over all ranks.
        micro_batches: This rank's share; never empty.
    """

    number: int
    epoch: float
    num_pairs: int
    pairs: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]


Cut = Callable[[Sequence[int]], Sequence[MicroBatch]]
"""Cuts pairs into micro-batches, each pair in one of them. It decides speed and memory, never the result."""


class DataRank(NamedTuple):
    """A process among those that share the pairs of every step and average their gradients.

    Attributes:
        rank: Which one it is, from 0 on.
        num_ranks: How many there are.
    """

    rank: int
    num_ranks: int


def deal(cuts: Sequence[MicroBatch], rank: DataRank) -> tuple[MicroBatch, ...]:
    """Return one rank's share of micro-batches: one at every turn, so that all ranks make as many forward passes.

    Args:
        cuts: The micro-batches of all ranks.
        rank: The rank. At the last turn it may get one of another rank as a filler.
    """
    return filled_up([cuts[start :: rank.num_ranks] for start in range(rank.num_ranks)], rank.rank, cuts[-1:])


def filled_up(
    shares: Sequence[Sequence[MicroBatch]], rank: int, smallest: Sequence[MicroBatch]
) -> tuple[MicroBatch, ...]:
    """Return one rank's micro-batches and as many fillers as it lacks: a forward pass may need all ranks.

    Args:
        shares: The micro-batches of each rank.
        rank: The rank.
        smallest: What fillers are made of: one that counts on some rank, if any does.
    """
    fillers = [MicroBatch(cut.pairs, filler=True) for cut in smallest]
    return (*shares[rank], *fillers * (max(map(len, shares)) - len(shares[rank])))


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a run.

    Args:
        indices: The pairs to train on, as indices into the data.
        lengths: Tokens of all pairs of the data in their longer sequence, by which ranks share the work.
        pairs_per_step: Pairs of a step over all ranks; an epoch's last step may have fewer.
        epochs: Passes over the data; a fraction ends within an epoch.
        max_steps: Where to stop earlier, or None.
        shuffle: Whether each epoch has an order of its own; else the order of the data.
        seed: Decides the orders.
    """

    indices: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pairs_per_step: int
    epochs: float
    max_steps: int | None
    shuffle: bool
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(len(self.indices) / self.pairs_per_step)

    @property
    def steps_by_epochs(self) -> int:
        """Optimizer steps that `epochs` asks for, `max_steps` left aside."""
        return math.ceil(Fraction(str(self.epochs)) * self.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return min(self.steps_by_epochs, self.max_steps or self.steps_by_epochs)

    def epochs_after(self, step: int) -> float:
        """Return how many passes over the data are completed after a step, counted from 1."""
        epochs, place = divmod(step - 1, self.steps_per_epoch)
        return epochs + min((place + 1) * self.pairs_per_step, len(self.indices)) / len(self.indices)

    def trained_on(self) -> NDArray[np.int64]:
        """Return the indices of the pairs that some step of the run uses, ascending."""
        if self.num_steps >= self.steps_per_epoch:
            return np.sort(self.indices)
        return np.sort(self.in_order(0)[: self.num_steps * self.pairs_per_step])

    def in_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of the training pairs in the order of an epoch, counted from 0."""
        return self.indices[self._order(epoch)]

    def steps(self, cut: Cut, after: int = 0, rank: int = 0, num_ranks: int = 1) -> Iterator[Step]:
        """Yield the steps after step `after`, as one rank sees them, each cut into micro-batches."""
        order, epoch_at_hand = np.empty(0, np.int64), -1
        for number in range(after + 1, self.num_steps + 1):
            epoch, place = divmod(number - 1, self.steps_per_epoch)
            if epoch != epoch_at_hand:
                order, epoch_at_hand = self.in_order(epoch), epoch
            pairs = tuple(order[place * self.pairs_per_step : (place + 1) * self.pairs_per_step].tolist())
            yield Step(
                number=number,
                epoch=self.epochs_after(number),
                num_pairs=len(pairs),
                pairs=pairs,
                micro_batches=self._share(pairs, cut, rank, num_ranks),
            )

    def _share(self, pairs: Sequence[int], cut: Cut, rank: int, num_ranks: int) -> tuple[MicroBatch, ...]:
        """Cut one rank's share of a step, filled up to as many micro-batches as every other rank has.

        A filler has the step's shortest pair, which counts on another rank: where its numbers are not finite, the
        step's are not either, so that no filler spoils a step.
        """
        if num_ranks == 1:
            return tuple(cut(pairs))
        by_length = _longest_first(pairs, self.lengths)
        # Dealt out and back again (0 1 1 0 0 1 …), so that every rank has about as many tokens.
        shares: list[list[int]] = [[] for _ in range(num_ranks)]
        for place, index in enumerate(by_length):
            there, turn = place % num_ranks, place // num_ranks
            shares[there if turn % 2 == 0 else num_ranks - 1 - there].append(index)
        return filled_up([cut(share) if share else [] for share in shares], rank, [MicroBatch((by_length[-1],))])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions of one epoch. Raw generator output is the part of NumPy that never changes."""
        if not self.shuffle:
            return np.arange(len(self.indices))
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.indices))
        return np.argsort(draws, kind="stable")


def largest(
    sizes: PairSizes, cuts: Sequence[MicroBatch], tokens: Callable[[PairSizes, Sequence[int]], int]
) -> set[MicroBatch]:
    """Return the micro-batches that may take most memory: one has the most tokens, one the longest sequences together.

    Each sequence has keys of its own for attention, also where its prompt is shared and is in the row once.

    Args:
        sizes: Of all pairs.
        cuts: The micro-batches.
        tokens: Counts those of a forward pass over some pairs.
    """
    most_tokens = max(cuts, key=lambda cut: tokens(sizes, cut.pairs))
    return {most_tokens, max(cuts, key=lambda cut: int(sizes.longest[list(cut.pairs)].sum()))}


def _longest_first(indices: Sequence[int], lengths: NDArray[np.int64]) -> list[int]:
    """Sort pairs by length, the longest first, and those of one length by their index."""
    return sorted(indices, key=lambda index: (-lengths[index], index))
