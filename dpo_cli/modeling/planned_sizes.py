"""What a model without weights would come to under an adapter, with its matrices in 4 bits or not.

The libraries that make both take a second to import, which who is only told of them need not wait for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dpo_cli.modeling.adapters.targets import is_bypassed, target_names
from dpo_cli.modeling.held import FLOAT32
from dpo_cli.modeling.sharded_sizes import Sharding, Weight, layer_of, sizes_of_rank
from dpo_cli.modeling.sizes import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_cli.modeling.adapters.settings import Lora

_LEVELS, _FINE_LEVELS = 16, 256
"""The numbers that 4 bits, and the 8 bits of a block's scale, stand for."""

_BLOCK, _SCALES_BLOCK = 64, 256
"""How many weights have a scale in common, and how many scales."""


def nf4_bytes(numbers: int) -> tuple[int, int]:
    """Return what a matrix of so many weights takes in 4 bits each, and what its scales take."""
    blocks = math.ceil(numbers / _BLOCK)
    scales = blocks + 4 * (math.ceil(blocks / _SCALES_BLOCK) + _LEVELS + _FINE_LEVELS + 1)
    return math.ceil(numbers / 2), scales


def kept_in_dtype(model: PreTrainedModel) -> list[str]:
    """Return what is not quantized: embeddings, head, and layers whose weights are used without calling them."""
    return [*get_keys_to_not_convert(model), *(name for name, _ in model.named_modules() if is_bypassed(model, name))]


def lora_weights(model: PreTrainedModel, adapter: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the weights that a LoRA would add to a model, without content, by the layer that they are added to.

    Raises:
        UserError: The model has no layers for it.
    """
    added = {}
    for name in target_names(model, adapter.targets):
        rows, columns = _sides(model.get_submodule(name))
        down = torch.empty(adapter.rank, columns, device="meta")
        added[name] = down, torch.empty(rows, adapter.rank, device="meta")
    return added


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear layer gives and takes."""
    weights = layer.weight
    assert isinstance(weights, torch.Tensor)
    first, second = weights.shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def sizes_under_lora(
    model: PreTrainedModel, adapter: Lora, dtype: torch.dtype, *, quantized: bool, shards: Sharding | None = None
) -> Sizes:
    """Return what a model comes to whose base is held in a dtype beneath a LoRA, in whatever it is held now.

    Args:
        model: The model without an adapter; its weights may be missing.
        adapter: The LoRA; of its settings those count that decide its size.
        dtype: What is held in.
        quantized: Whether matrices of linear layers are held in 4 bits.
        shards: How weights are sharded; None: not at all.

    Raises:
        UserError: The model has no layers for it.
    """
    few, layers = _quantizable(model) if quantized else {}, layer_of(model)

    def weight(values: torch.Tensor) -> Weight:
        held = torch.empty(values.shape, dtype=dtype, device="meta")
        bits = nf4_bytes(few[id(values)]) if id(values) in few else None
        return Weight(held, layers.get(id(values), -1), trains=False, bits=bits)

    base = [weight(values) for values in model.parameters()]
    added = [
        Weight(values, layers.get(id(model.get_submodule(name).weight), -1), trains=True)
        for name, pair in lora_weights(model, adapter).items()
        for values in pair
    ]
    moved = [one.values for one in added]
    numbers = sum(one.values.numel() for one in (*base, *added))
    return sizes_of_rank([*base, *added], moved, FLOAT32, shards or Sharding(1), numbers, beginning=False)


def _quantizable(model: PreTrainedModel) -> dict[int, int]:
    """Return how many numbers each matrix has that would be quantized, by its identity."""
    kept = [*kept_in_dtype(model), *(model._keep_in_fp32_modules or ())]
    found = {}
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            found[id(module.weight)] = module.weight.numel()
    return found
