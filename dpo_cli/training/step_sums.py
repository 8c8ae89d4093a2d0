"""Metrics of a step as sums and counts: added up over micro-batches and ranks, reduced once, then divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.preference.metrics import PAIR_METRICS

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepFigures:
    """What is read of a step at its end.

    Attributes:
        means: Of each of `PAIR_METRICS`, over the step's pairs, all ranks together.
        num_tokens: Tokens of all ranks' forward passes, without padding.
        stop: Whether any rank was asked to stop.
        ran_out: Whether memory ran out on any rank, so that the means are those of a part of the step.
        further: What else was read, by name.
    """

    means: dict[str, float]
    num_tokens: int
    stop: bool
    ran_out: bool
    further: dict[str, float]


class StepSums:
    """What one rank adds up over the micro-batches of a step, on the device, which the host asks once.

    Args:
        device: Where the sums are kept until they are read.
        ran_out: Whether memory ran out on this rank.
    """

    def __init__(self, device: torch.device, *, ran_out: bool = False) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(PAIR_METRICS) + 4, dtype=dtype, device=device)
        self._num_pairs = self._num_tokens = self._stops = 0
        self._ran_out = int(ran_out)

    def add(self, values: Tensor, num_tokens: int) -> None:
        """Add a micro-batch: its `pair_values`, `[B, 9]`, and its tokens."""
        self._sums[: len(PAIR_METRICS)] += values.sum(0)
        self._num_pairs += len(values)
        self._num_tokens += num_tokens

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was asked to stop."""
        self._stops += 1

    def read(self, accelerator: Accelerator, further: Mapping[str, Tensor]) -> StepFigures:
        """Add the ranks' sums together and wait for the device, once.

        Args:
            accelerator: Knows the ranks.
            further: What else is read, by name, a number each; all ranks have the same.
        """
        counts = self._num_pairs, self._num_tokens, self._stops, self._ran_out
        for place, count in enumerate(counts, len(PAIR_METRICS)):
            self._sums[place] += count
        total = accelerator.reduce(self._sums, reduction="sum")
        numbers = [number.detach().to(total.device, total.dtype).reshape(1) for number in further.values()]
        values = torch.cat([total, *numbers]).tolist()
        *sums, num_pairs, num_tokens, stops, ran_out = values[: len(total)]
        # Where memory ran out on every rank, there is not one.
        means = {name: value / max(num_pairs, 1) for name, value in zip(PAIR_METRICS, sums, strict=True)}
        others = dict(zip(further, values[len(total) :], strict=True))
        return StepFigures(means, int(num_tokens), stops > 0, ran_out > 0, others)
