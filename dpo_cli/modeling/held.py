"""How weights are held in memory: `Held` at the end lists the ways.

A way says what a model is loaded as, how many bytes that takes, and what an optimizer steps on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from dpo_cli.settings import Settings

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel


class Float32(Settings):
    """Hold every weight in 32 bits; the optimizer steps on the weights themselves."""

    type: Literal["float32"] = "float32"
    """How weights are held."""

    def loaded_as(self) -> dict[str, Any]:
        """Return what transformers is told when it builds or loads a model."""
        import torch

        return {"dtype": torch.float32}

    def bytes_of(self, model: PreTrainedModel) -> int:
        """Return what all weights take."""
        return sum(parameter.nbytes for parameter in model.parameters())

    def gradient_bytes(self, trained: Sequence[Parameter]) -> int:
        """Return what the gradients of the weights that train take."""
        return sum(parameter.nbytes for parameter in trained)

    def stepped(self, trained: Sequence[Parameter]) -> list[Parameter]:
        """Return what an optimizer steps on in place of the weights that train."""
        return list(trained)


FLOAT32 = Float32()

Held = Float32
"""The closed union of all ways to hold weights, told apart by `type`."""
