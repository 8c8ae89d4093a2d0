"""A copy of a model beside it, which takes the memory of what training moves alone."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares the weights which do not train, and takes no gradient."""
    shared: dict[int, Any] = {id(weights): weights for weights in model.parameters() if not weights.requires_grad}
    if "bitsandbytes" in sys.modules:
        from dpo_cli.modeling.quantized_layers import states

        shared |= {id(state): state for state in states(model)}
    other: PreTrainedModel = copy.deepcopy(model, shared)
    return other.requires_grad_(False)
