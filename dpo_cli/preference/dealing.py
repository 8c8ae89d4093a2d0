"""Micro-batches dealt to the ranks where nothing is learned from them: the reference's pass and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_cli.data.prepared.step_plan import MicroBatch, deal
from dpo_cli.modeling.data_ranks import data_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


def dealt(
    cuts: Sequence[MicroBatch], accelerator: Accelerator, progress: Callable[[int], None]
) -> Iterator[MicroBatch]:
    """Yield this rank's share of micro-batches, as `deal` has it.

    Args:
        cuts: The micro-batches of all ranks.
        accelerator: Knows the ranks.
        progress: Called with pairs done after each turn but the last, which ends when the results are gathered.
    """
    rank, done = data_rank(accelerator), 0
    for start, micro_batch in zip(range(0, len(cuts), rank.num_ranks), deal(cuts, rank), strict=True):
        yield micro_batch
        done += sum(len(cut.pairs) for cut in cuts[start : start + rank.num_ranks])
        if start + rank.num_ranks < len(cuts):
            progress(done)
