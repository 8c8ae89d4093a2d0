"""Models with fewer layers than they have, from which what all layers take is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpo_cli.errors import UserError
from dpo_cli.modeling.compiled import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def shallow(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the settings of a model that has the first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return config


def extrapolated(model: PreTrainedModel, count: Callable[[PreTrainedConfig], int]) -> int:
    """Return what is counted of a model, which is counted of few layers where all further ones add the same.

    Args:
        model: The model, maybe without weights; its settings and the shapes of its layers are looked at.
        count: Counts, by settings with some number of layers.
    """
    config, layers = model.config, _layers(model)
    num_layers = config.get_text_config().num_hidden_layers
    period = _period(layers) if len(layers) == num_layers else num_layers
    repeats, behind = divmod(num_layers, period)
    if repeats <= 6 or behind:
        return count(copy.deepcopy(config))
    try:
        one, two, three = (count(shallow(config, period * times)) for times in (1, 2, 3))
    except UserError:
        # An adapter is beside later layers alone.
        return count(copy.deepcopy(config))
    added = two - one
    return one + (repeats - 1) * added if three - two == added else count(copy.deepcopy(config))


def _layers(model: PreTrainedModel) -> list[object]:
    """Return of each decoder layer its kind and its weights' names and shapes: layers that are alike have the same."""
    layers = decoder_layers(model)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    weights = [[(name, one.shape, one.requires_grad) for name, one in layer.named_parameters()] for layer in layers]
    return list(zip(kinds, weights, strict=False))


def _period(layers: Sequence[object]) -> int:
    """Return after how many layers they repeat throughout; of those that do not, how many there are."""
    sizes, last = range(1, len(layers)), len(layers) or 1
    return next((size for size in sizes if layers[size:] == layers[:-size]), last)
