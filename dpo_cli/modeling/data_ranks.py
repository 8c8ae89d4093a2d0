"""Which processes share the pairs of a run: asked here by all that deals pairs or averages gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.data.prepared.step_plan import DataRank

if TYPE_CHECKING:
    from accelerate import Accelerator


def data_rank(accelerator: Accelerator) -> DataRank:
    """Return this process among those that share the pairs: all of them, however weights are placed."""
    return DataRank(accelerator.process_index, accelerator.num_processes)
