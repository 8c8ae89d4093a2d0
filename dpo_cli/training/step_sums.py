"""Metrics of a step as sums and counts: added up over micro-batches and ranks, reduced once, then divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.preference.metrics import PAIR_METRICS

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepSums:
    """What one rank adds up over the micro-batches of a step.

    Args:
        device: Where the sums are kept until they are reduced.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(PAIR_METRICS) + 3, dtype=dtype, device=device)

    def add(self, values: Tensor, num_tokens: int) -> None:
        """Add a micro-batch: its `pair_values`, `[B, 9]`, and its tokens."""
        self._sums[:-3] += values.sum(0)
        self._sums[-3] += len(values)
        self._sums[-2] += num_tokens

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was asked to stop."""
        self._sums[-1] += 1

    def reduce(self, accelerator: Accelerator) -> tuple[dict[str, float], int, bool]:
        """Add the ranks' sums together, once; return means, tokens, and whether any rank should stop."""
        total = accelerator.reduce(self._sums, reduction="sum").tolist()
        *sums, num_pairs, num_tokens, stops = total
        means = {name: value / num_pairs for name, value in zip(PAIR_METRICS, sums, strict=True)}
        return means, int(num_tokens), stops > 0
