"""The precisions that a run can compute in; `PRECISIONS` at the end lists them.

This file is read with the configuration, before torch is needed: import torch inside functions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Precision:
    """What a run computes in.

    Attributes:
        name: What `model.dtype` and torch call it.
        mixed: What Accelerate calls it.
        exactness: The largest difference of one token's log-probability, in nats, that is taken for rounding where a
            run in this precision is proved: in float32, whatever the precision.
        tie: Rewards, or log-probabilities in nats, that are this near are equal: rounding makes such differences.
        on_cpu: Whether a CPU can train in it.
    """

    name: str
    mixed: str
    exactness: float
    tie: float
    on_cpu: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What torch computes in."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def is_lower(self) -> bool:
        """Whether it has fewer bits than float32."""
        return self.mixed != "no"

    def autocast(self, device: str) -> AbstractContextManager[None]:
        """Compute in it on a kind of device, as torch names it."""
        import torch

        return torch.autocast(device, self.dtype, enabled=self.is_lower)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", "no", 1e-4, 1e-4),
        Precision("bfloat16", "bf16", 1e-3, 0.05),
        Precision("float16", "fp16", 1e-3, 0.006, on_cpu=False),
    )
}
"""All precisions, by name.

On SmolLM2-135M the difference of two responses' log-probabilities in bfloat16 changes by 0.2 nats (root mean square)
when micro-batches are cut otherwise, and a reward at β = 0.1 by a tenth of that: a tie is 2.5 times as much. float16
has three bits more.
"""


def precision_of(mixed: str) -> Precision:
    """Return the precision that Accelerate calls so."""
    return next(precision for precision in PRECISIONS.values() if precision.mixed == mixed)
