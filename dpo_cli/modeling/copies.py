"""A copy of a model beside it, which takes the memory of what training moves alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares the weights which do not train, and takes no gradient."""
    shared = {id(weights): weights for weights in model.parameters() if not weights.requires_grad}
    other: PreTrainedModel = copy.deepcopy(model, shared)
    return other.requires_grad_(False)
