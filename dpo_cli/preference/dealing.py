"""Micro-batches dealt to the ranks where nothing is learned from them: the reference's pass and evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_cli.data.prepared.step_plan import MicroBatch

if TYPE_CHECKING:
    from accelerate import Accelerator


def deal(cuts: Sequence[MicroBatch], accelerator: Accelerator, progress: Callable[[int], None]) -> Iterator[MicroBatch]:
    """Yield this rank's share of micro-batches, one at every turn, so that all ranks have as many.

    Args:
        cuts: The micro-batches of all ranks. At the last turn a rank may get one of another rank as a filler, since a
            forward pass may need all of them.
        accelerator: Knows the ranks.
        progress: Called with pairs done after each turn but the last, which ends when the results are gathered.
    """
    rank, num_ranks, done = accelerator.process_index, accelerator.num_processes, 0
    for start in range(0, len(cuts), num_ranks):
        turn = cuts[start : start + num_ranks]
        yield turn[rank] if rank < len(turn) else dataclasses.replace(turn[0], filler=True)
        done += sum(len(cut.pairs) for cut in turn)
        if start + num_ranks < len(cuts):
            progress(done)
