"""The types that a model's files keep its weights in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from dpo_cli.modeling.folders.model_files import weights_files

_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types that weights are written in, as safetensors files call them."""


@dataclass(frozen=True)
class WeightTypes:
    """The type of every weight of a model.

    Attributes:
        named: By the name of a weight in the files that it came from.
        other: That of all others.
    """

    named: dict[str, torch.dtype]
    other: torch.dtype

    @classmethod
    def of_files(cls, folder: Path) -> WeightTypes:
        """Read the types in which a model folder keeps its weights; what float32 cannot hold becomes float32."""
        found = dict(_stored(folder))
        kinds = set(found.values())
        return cls(found, kinds.pop()) if len(kinds) == 1 else cls(found, torch.float32)

    def __str__(self) -> str:
        """Name them: one, or all that there are."""
        return ", ".join(sorted({str(kind).removeprefix("torch.") for kind in (*self.named.values(), self.other)}))

    @property
    def rounds(self) -> bool:
        """Whether a number of float32 may be another in one of them."""
        return {self.other, *self.named.values()} != {torch.float32}

    @property
    def most(self) -> float:
        """The largest number that all of them can hold."""
        return min(torch.finfo(kind).max for kind in (self.other, *self.named.values()))

    def __getitem__(self, name: str) -> torch.dtype:
        """Return the type of the weight of that name."""
        return self.named.get(name, self.other)


def _stored(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """Yield name and type of the weights in a model's files that are no whole numbers."""
    for file in weights_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            yield from ((name, _TYPES.get(kind, torch.float32)) for name, kind in kinds.items() if "F" in kind)
        else:
            for name, weights in torch.load(file, map_location="meta", weights_only=True).items():
                if weights.is_floating_point():
                    yield name, weights.dtype if weights.dtype in _TYPES.values() else torch.float32
