"""The layers of LoRA and DoRA as PEFT makes them, made exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def refine(layer: Any) -> None:
    """Let DoRA begin as the base, and a layer without it keep no copy of its input in another dtype."""
    _measure_norms(layer)
    if not layer.lora_magnitude_vector:
        # Autocast casts as it multiplies, and layers that have an input in common then keep it once.
        layer._cast_input_dtype = _cast_outside_autocast


@contextlib.contextmanager
def norms_unmeasured() -> Iterator[None]:
    """Let PEFT give DoRA's norms their shape alone: a base without weights has none, which PEFT would measure."""
    from peft.tuners.lora.dora import DoraLinearLayer

    def shaped(self: Any, *, lora_B: Tensor, **others: Any) -> None:
        self.weight = nn.Parameter(lora_B.new_empty(lora_B.shape[0]))

    measured, DoraLinearLayer.update_layer = DoraLinearLayer.update_layer, shaped
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = measured


def _cast_outside_autocast(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a layer's inputs to the dtype of its adapter, unless autocast does."""
    return inputs if torch.is_autocast_enabled(inputs.device.type) else inputs.to(dtype)


def _measure_norms(layer: Any) -> None:
    """Set the norms that DoRA trains to those of the base's rows, in float32, as its forward pass computes them.

    PEFT rounds them to the dtype of the base, and the model would not answer as its base before step 1.
    """
    for name, norms in layer.lora_magnitude_vector.items():
        if norms.weight.is_meta:
            continue
        factors = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
        norms.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[name], **factors)
