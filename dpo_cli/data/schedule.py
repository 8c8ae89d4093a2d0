"""The step plan: which pairs make up which optimizer step, cut into micro-batches, for each rank.

The plan is a pure function of lengths, seed, epoch and number of ranks. To resume is to skip its first
steps; nothing is replayed. How a step is cut decides speed and memory, never its gradient: the loop weighs
every pair by one over the pairs of its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


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


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a run.

    Args:
        indices: The pairs to train on, as indices into the data.
        lengths: Tokens of each of them in its longer sequence, `[pairs]`.
        pairs_per_step: Pairs of a step over all ranks; an epoch's last step may have fewer.
        micro_batch_tokens: The most tokens of one forward pass, padding included; a pair that alone has
            more makes up a micro-batch by itself.
        epochs: Passes over the data; a fraction ends within an epoch.
        max_steps: Where to stop earlier, or None.
        shuffle: Whether each epoch has an order of its own; else the order of the data.
        seed: Decides the orders.
    """

    indices: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pairs_per_step: int
    micro_batch_tokens: int
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

    def trained_on(self) -> NDArray[np.int64]:
        """Return the indices of the pairs that some step of the run uses, ascending."""
        if self.num_steps >= self.steps_per_epoch:
            return np.sort(self.indices)
        return np.sort(self.indices[self._order(0)[: self.num_steps * self.pairs_per_step]])

    def steps(self, after: int = 0, rank: int = 0, num_ranks: int = 1) -> Iterator[Step]:
        """Yield the steps after step `after`, as one rank sees them."""
        order, epoch_at_hand = np.empty(0, np.int64), -1
        for number in range(after + 1, self.num_steps + 1):
            epoch, place = divmod(number - 1, self.steps_per_epoch)
            if epoch != epoch_at_hand:
                order, epoch_at_hand = self._order(epoch), epoch
            chosen = order[place * self.pairs_per_step : (place + 1) * self.pairs_per_step]
            lengths = {int(self.indices[i]): int(self.lengths[i]) for i in chosen}
            yield Step(
                number=number,
                epoch=epoch + min((place + 1) * self.pairs_per_step, len(order)) / len(order),
                num_pairs=len(chosen),
                pairs=tuple(int(self.indices[i]) for i in chosen),
                micro_batches=cut_for_rank(lengths, self.micro_batch_tokens, rank, num_ranks),
            )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the positions of one epoch. Raw generator output is the part of NumPy that never changes."""
        if not self.shuffle:
            return np.arange(len(self.indices))
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.indices))
        return np.argsort(draws, kind="stable")


def cut_for_rank(lengths: dict[int, int], micro_batch_tokens: int, rank: int, num_ranks: int) -> tuple[MicroBatch, ...]:
    """Cut one rank's share of a step. A rank without a share gets a filler, since it must still take part."""
    by_length = _longest_first(lengths)
    # Dealt out and back again (0 1 1 0 0 1 …), so that every rank has about as many tokens.
    share = [
        index
        for place, index in enumerate(by_length)
        if (place % num_ranks if (place // num_ranks) % 2 == 0 else num_ranks - 1 - place % num_ranks) == rank
    ]
    if not share:
        return (MicroBatch((by_length[-1],), filler=True),)
    return tuple(cut_by_tokens({index: lengths[index] for index in share}, micro_batch_tokens))


def cut_by_tokens(lengths: dict[int, int], micro_batch_tokens: int) -> Iterator[MicroBatch]:
    """Cut pairs, the longest first, so that their padded size (two sequences a pair) stays in the budget.

    Args:
        lengths: Their indices, and the tokens of each in its longer sequence.
        micro_batch_tokens: The most tokens of one micro-batch; a pair that alone has more is one by itself.
    """
    run: list[int] = []
    for index in _longest_first(lengths):
        if run and 2 * lengths[run[0]] * (len(run) + 1) > micro_batch_tokens:
            yield MicroBatch(tuple(run))
            run = []
        run.append(index)
    if run:
        yield MicroBatch(tuple(run))


def _longest_first(lengths: dict[int, int]) -> list[int]:
    return sorted(lengths, key=lambda index: (-lengths[index], index))
