"""What a session computes with where its devices are assumed: their number and their kind, and nothing that runs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch

from dpo_cli.modeling.precision import PRECISIONS


@dataclass(frozen=True)
class AbsentDevices:
    """What is asked of Accelerate before anything is computed, for GPUs that are not here.

    Attributes:
        num_processes: How many there are, one process on each.
        mixed_precision: What Accelerate calls the precision that is computed in.
    """

    num_processes: int
    mixed_precision: str
    process_index: ClassVar[int] = 0
    is_main_process: ClassVar[bool] = True
    device: ClassVar[torch.device] = torch.device("cuda")

    @classmethod
    def computing(cls, num_processes: int, dtype: str) -> AbsentDevices:
        """Return so many, that compute as `model.dtype` says; `auto`: in bfloat16, which GPUs of today have."""
        return cls(num_processes, PRECISIONS["bfloat16" if dtype == "auto" else dtype].mixed)

    def main_process_first(self) -> AbstractContextManager[None]:
        """Return the context of what the first process does before the others: there are no others here."""
        return contextlib.nullcontext()
