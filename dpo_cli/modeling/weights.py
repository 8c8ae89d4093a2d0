"""The weights of a model that training moves: looked at, set and compared, whatever it is that trains.

How they are saved and read again depends on what trains: `trained.py` lists the kinds. Where weights are sharded over
processes, all of them have to ask together, and set or get the values of what each has.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch.distributed import ReduceOp

from dpo_cli.modeling.shards import local, reduced

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

START_ADAPTER = "start adapter"
"""What the digest of an adapter to go on from is called."""


class MovedWeights:
    """The weights of a model that training moves.

    Args:
        model: The model, in which what trains was chosen.

    Attributes:
        model: As above.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def of(self, model: PreTrainedModel) -> Self:
        """Return those of a copy of the model, in which what trains was chosen already."""
        other = copy.copy(self)
        other.model = model
        return other

    def moved(self) -> dict[str, Parameter]:
        """Return by name what training moves, tied weights once, whether it takes gradients now or not."""
        raise NotImplementedError

    def digests(self, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Return a digest of each part of what answers now, by what it is called, as if held in a dtype."""
        raise NotImplementedError

    def trained(self) -> list[Parameter]:
        """Return the weights that take gradients now."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every weight that training moves, by name."""
        return {name: parameter.shape for name, parameter in self.moved().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return every weight that training moves by name, tied ones once, without copying it."""
        return {name: parameter.detach() for name, parameter in self.moved().items()}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace every weight that training moves by what `tensors` returned.

        Raises:
            ValueError: Names or shapes are others.
        """
        if {name: tensor.shape for name, tensor in tensors.items()} != self.shapes():
            raise ValueError("the weights belong to another model")
        for name, ours in self.tensors().items():
            ours.copy_(tensors[name])

    @torch.no_grad()
    def move_towards(self, other: MovedWeights, share: float) -> None:
        """Move a share of the way to those of another model: θ ← share·θ' + (1 − share)·θ."""
        theirs = other.tensors()
        for name, ours in self.tensors().items():
            ours.lerp_(theirs[name], share)

    def finite(self) -> bool:
        """Tell whether no weight that training moves is NaN or infinite."""
        values = self.tensors().values()
        return bool(reduced(all(bool(torch.isfinite(local(one)).all()) for one in values), values, ReduceOp.MIN))

    def largest(self) -> float:
        """Return the largest magnitude among the weights that training moves."""
        values = self.tensors().values()
        parts = [local(one) for one in values]
        largest = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
        return reduced(largest, values, ReduceOp.MAX)

    def first_not_finite(self) -> str | None:
        """Return the name of a weight, whether training moves it or not, that is NaN or infinite somewhere, or None."""
        weights = ((name, one) for name, one in self.model.named_parameters() if one.is_floating_point())
        return next((name for name, one in weights if not bool(torch.isfinite(one).all())), None)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """A digest of each part of what answers before step 1, which they have to be asked for before."""
        return self.digests()

    def began_with(self, fingerprints: Mapping[str, str]) -> str | None:
        """Return which part of the model before step 1 is not that of some fingerprints, in whatever dtype; or None.

        It has to be asked before step 1. A start adapter that only one of them has is such a part.
        """
        for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
            ours = self.digests(dtype) if dtype else self.fingerprints
            differing = [name for name in (*ours, START_ADAPTER) if fingerprints.get(name) != ours.get(name)]
            if not differing:
                return None
        return differing[0]

    def is_beside(self, digest: str) -> bool:
        """Tell whether the digest of a base, held in whatever dtype, is that of the one that an adapter is beside.

        It has to be asked before step 1.
        """
        return self.began_with({**self.fingerprints, "model": digest}) is None
