"""How weights are held in memory: `Held` at the end lists the ways.

A way says what a model is loaded as, how many bytes that takes, and what an optimizer steps on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from dpo_cli.settings import Settings

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel


class HeldSettings(Settings):
    """Hold every weight in one dtype of torch; the optimizer steps on the weights themselves."""

    dtype: ClassVar[str]

    def loaded_as(self) -> dict[str, Any]:
        """Return what transformers is told when it builds or loads a model."""
        import torch

        return {"dtype": getattr(torch, self.dtype)}

    def bytes_of(self, model: PreTrainedModel) -> int:
        """Return what all weights take."""
        return sum(parameter.nbytes for parameter in model.parameters())

    def gradient_bytes(self, trained: Sequence[Parameter]) -> int:
        """Return what the gradients of the weights that train take."""
        return sum(parameter.nbytes for parameter in trained)

    def stepped(self, trained: Sequence[Parameter]) -> list[Parameter]:
        """Return what an optimizer steps on in place of the weights that train."""
        return list(trained)


class Float32(HeldSettings):
    """Hold every weight in 32 bits."""

    type: Literal["float32"] = "float32"
    """How weights are held."""
    dtype: ClassVar[str] = "float32"


class Bfloat16(HeldSettings):
    """Hold every weight in bfloat16: for weights that do not train."""

    type: Literal["bfloat16"] = "bfloat16"
    """How weights are held."""
    dtype: ClassVar[str] = "bfloat16"


class Float16(HeldSettings):
    """Hold every weight in float16: for weights that do not train."""

    type: Literal["float16"] = "float16"
    """How weights are held."""
    dtype: ClassVar[str] = "float16"


FLOAT32 = Float32()

Held = Float32 | Bfloat16 | Float16
"""The closed union of all ways to hold weights, told apart by `type`."""


def held_as(name: str) -> Held:
    """Return the way of that name."""
    found: Held = next(one for one in get_args(Held) if one.model_fields["type"].default == name)()
    return found
