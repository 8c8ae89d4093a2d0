"""Models with fewer layers than they have, from which what all layers take is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpo_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def shallow(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return the settings of a model that has the first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return config


def extrapolated(config: PreTrainedConfig, count: Callable[[PreTrainedConfig], int]) -> int:
    """Return what is counted of a model, which is counted of few layers where all further ones add the same.

    Args:
        config: The model's settings.
        count: Counts, by settings with some number of layers.
    """
    text = config.get_text_config()
    num_layers, period = text.num_hidden_layers, _period(getattr(text, "layer_types", None) or ())
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


def _period(kinds: list[str] | tuple[str, ...]) -> int:
    """Return after how many layers their kinds repeat."""
    sizes = range(1, len(kinds))
    return next((size for size in sizes if all(a == b for a, b in zip(kinds, kinds[size:], strict=False))), 1)
