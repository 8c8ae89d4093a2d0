"""What holds the policy to its reference: f-divergences other than the reverse KL of plain DPO.

Each turns x = log π − log π_ref of a response into f′(π / π_ref), of which chosen and rejected are then compared.
Source: Wang et al. 2023, arXiv 2309.16240.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpo_cli.preference.losses.base import ls
from dpo_cli.settings import OneOf, Settings, types

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_EXPONENT = 40.0
"""Exponents are clamped to it, so that the square of an exponential, as in a gradient's norm, is finite in float32."""


class ReverseKL(Settings):
    """KL(π ‖ π_ref), the divergence of plain DPO."""

    type: Literal["reverse_kl"] = "reverse_kl"
    """Which divergence."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class ForwardKL(Settings):
    """KL(π_ref ‖ π): mode-covering rather than mode-seeking."""

    type: Literal["forward_kl"] = "forward_kl"
    """Which divergence."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return 1 − e^(−x)."""
        return 1 - (-x).clamp(max=_LARGEST_EXPONENT).exp()


class JensenShannon(Settings):
    """The Jensen–Shannon divergence, between the two directions of KL."""

    type: Literal["js"] = "js"
    """Which divergence."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return log 2 + log σ(x)."""
        return math.log(2) + ls(x)


class Alpha(Settings):
    """The α-divergences, from forward KL (α → 0) to reverse KL (α → 1); the paper's α is 1 − α here."""

    type: Literal["alpha"] = "alpha"
    """Which divergence."""
    alpha: float = Field(0.5, gt=0, lt=1)
    """Between forward KL, 0, and reverse KL, 1."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return (e^((α−1)x) − 1) / (α−1)."""
        power = self.alpha - 1
        return (power * x).clamp(max=_LARGEST_EXPONENT).expm1() / power


def _named(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


_Divergence = Annotated[ReverseKL | ForwardKL | JensenShannon | Alpha, Field(discriminator="type")]
Divergence = Annotated[
    _Divergence,
    BeforeValidator(_named, json_schema_input_type=Annotated[str, OneOf(*types(_Divergence))] | _Divergence),
]
"""The closed union of all divergences, discriminated by `type`; a string alone is a type."""
