"""The layers of bitsandbytes, which hold a matrix in 4 or 8 bits a weight.

They multiply by the matrix that the few bits stand for, in the run's precision, and make it again for the backward
pass; so do all that ask: with and without gradient, packed and padded, DoRA for its norms.

bitsandbytes is optional: import this module inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpo_cli.errors import UserError
from dpo_cli.modeling.extras import import_bitsandbytes
from dpo_cli.modeling.planned_sizes import kept_in_dtype, nf4_bytes
from dpo_cli.modeling.shards import is_sharded

import_bitsandbytes()
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402
from transformers.integrations import bitsandbytes as integration  # noqa: E402

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


class _Product(torch.autograd.Function):
    """x Wᵀ + b for a W of 8-bit rows; W itself is kept as it is held."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the matrix that the rows stand for."""
        ctx.save_for_backward(rows, scales)
        return functional.linear(inputs, _of_rows(rows, scales, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Multiply by the same matrix, transposed; nothing of it trains."""
        rows, scales = ctx.saved_tensors
        return gradients[0] @ _of_rows(rows, scales, gradients[0].dtype), None, None, None


def _of_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix that 8-bit rows and the largest absolute value of each stand for."""
    return rows.to(dtype).mul_(scales[:, None] / 127)


class Linear8bitRows(Linear8bitLt):  # type: ignore[misc]
    """A layer with 8 bits a weight, whose inputs are not rounded.

    bitsandbytes rounds them to 8 bits as well, but for columns that have a large value anywhere in the batch. So a
    token's result depends on what it is batched with; or, with a threshold of 0, each is rounded by its largest number.
    On SmolLM2-135M the log-probabilities of text are off by 0.21 nats a token then, and by 0.05 with the weights alone.
    """

    compute_dtype: torch.dtype
    source_cls: type[nn.Module]

    @property
    def scales(self) -> Tensor:
        """The largest absolute value of each row."""
        found: Tensor = self.weight.SCB
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the run's precision; return what came in."""
        inputs = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        result: Tensor = _Product.apply(inputs, self.weight.data, self.scales, bias)  # type: ignore[no-untyped-call]
        return result.to(x.dtype)


def lay_out(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Put quantized layers into a model without weights, where loading puts them.

    Raises:
        UserError: It has none to replace.
    """
    names = [*kept_in_dtype(model), *(model._keep_in_fp32_modules or ())]
    integration.replace_with_bnb_linear(model, modules_to_not_convert=names, quantization_config=config)
    if not quantized_layers(model):
        what = f"{type(model).__name__} has no linear layers that bitsandbytes knows, so nothing of it can be quantized"
        raise UserError(what, "`model.quantize`", "leave it out: `model.quantize: null`")


def quantize(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantize the linear layers of a model that has weights, as loading does."""
    layers = dict(model.named_modules())
    lay_out(model, config)
    operation = (integration.Bnb4bitQuantize if config.load_in_4bit else integration.Bnb8bitQuantize)(None)
    for name, layer in quantized_layers(model).items():
        weights = {f"{name}.weight": [layers[name].weight.data]}
        (layer.weight,) = operation.convert(weights, model=model).values()
        layer.bias = layers[name].bias


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let quantized layers compute in a dtype, and in one way only.

    Where nothing has a gradient, bitsandbytes has faster products for some CPUs. They round more, they hold the weights
    otherwise from then on, and no gradient goes through them any more.
    """
    for name, layer in quantized_layers(model).items():
        if layer.bias is not None and layer.bias.is_meta:
            # Without weights bitsandbytes makes it in float32, and loading in the dtype.
            layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        if isinstance(layer, Linear4bit):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False
            if layer.weight.quant_state is not None:
                layer.weight.quant_state.dtype = dtype
        elif not isinstance(layer, Linear8bitRows):
            rows = Linear8bitRows(layer.in_features, layer.out_features, False, has_fp16_weights=False, device="meta")
            rows.weight, rows.bias, rows.compute_dtype = layer.weight, layer.bias, dtype
            rows.source_cls = layer.source_cls
            rows.eval()
            model.set_submodule(name, rows)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the quantized layers of a model by name, whether an adapter is beside them or not."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))}


def held_numbers(model: nn.Module) -> int:
    """Return how many numbers the weights stand for."""
    layers = list(quantized_layers(model).values())
    few = {id(layer.weight) for layer in layers}
    others = sum(weights.numel() for weights in model.parameters() if id(weights) not in few)
    return others + sum(int(layer.in_features * layer.out_features) for layer in layers)


def held_bytes(model: nn.Module) -> int:
    """Return what the weights take in memory with the scales of those of few bits, whether they are there or not."""
    layers = list(quantized_layers(model).values())
    few = {id(layer.weight) for layer in layers}
    others = sum(weights.nbytes for weights in model.parameters() if id(weights) not in few)
    if any(layer.weight.is_meta or is_sharded(layer.weight) for layer in layers):
        return others + sum(sum(planned_bits(layer)) for layer in layers)
    return others + _storage_bytes(tensor for layer in layers for tensor in _tensors(layer))


def states(model: nn.Module) -> list[Any]:
    """Return what quantized layers keep beside their weights: the scales, and what they computed with last."""
    layers = quantized_layers(model).values()
    kept = [layer.weight.quant_state if isinstance(layer, Linear4bit) else layer.state for layer in layers]
    return [state for state in kept if state is not None]


def planned_bits(layer: Any) -> tuple[int, int]:
    """Return what the matrix of a layer takes, and its scales, whether they are there or not."""
    numbers = int(layer.in_features * layer.out_features)
    if isinstance(layer, Linear8bitLt):
        return numbers, 4 * int(layer.out_features)
    return nf4_bytes(numbers)


def _tensors(layer: Any) -> list[Tensor]:
    """Return what a quantized layer holds."""
    weight = layer.weight
    if isinstance(layer, Linear8bitLt):
        return [weight.data, weight.SCB]
    state = weight.quant_state
    return [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what tensors take, those that several layers share once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
