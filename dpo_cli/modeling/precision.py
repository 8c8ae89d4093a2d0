"""The precisions that a run can compute in; `PRECISIONS` at the end lists them.

This file is read with the configuration, before torch is needed: import torch inside functions.
"""

from __future__ import annotations

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
        token_tolerance: The largest difference of one token's log-probability, in nats, that rounding explains.
        norm_tolerance: The same of the gradient's norm, as a share of it.
        on_cpu: Whether a CPU can train in it.
    """

    name: str
    mixed: str
    token_tolerance: float
    norm_tolerance: float
    on_cpu: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What torch computes in."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", "no", 1e-4, 1e-3),
        Precision("bfloat16", "bf16", 0.3, 0.05),
        Precision("float16", "fp16", 0.05, 0.02, on_cpu=False),
    )
}
"""All precisions, by name."""


def precision_of(mixed: str) -> Precision:
    """Return the precision that Accelerate calls so."""
    return next(precision for precision in PRECISIONS.values() if precision.mixed == mixed)
