"""Quantized layers whose few bits are sharded over processes, by rows.

The bits are a plain parameter, which torch's `fully_shard` gathers as any other. Each matrix is quantized as a whole
where it is read, so that its bits and scales are those that it has on one device; every process keeps all scales.

bitsandbytes is optional: import this module inside functions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from dpo_cli.modeling.quantized_layers import Linear8bitRows, quantized_layers
from dpo_cli.modeling.shards import placeholder, set_local

from bitsandbytes import matmul_4bit  # isort: skip  (the module above imports it first)
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant  # isort: skip
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit  # isort: skip

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


class Scales:
    """The scales of a matrix. They never change, and copies of a layer have them in common.

    Attributes:
        state: As bitsandbytes keeps them; None: the matrix was not read yet.
    """

    state: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scales:
        """Return itself."""
        return self


class _Sharded(nn.Linear):
    """What layers of either number of bits do.

    Attributes:
        kept: The scales of the matrix.
    """

    kept: Scales
    compute_dtype: torch.dtype
    source_cls: type[nn.Module]

    @property
    def matrix(self) -> Tensor:
        """What a file has of the matrix, without content."""
        sides = (self.out_features, self.in_features)
        return torch.empty(sides[::-1] if self._is_turned else sides, dtype=self.compute_dtype, device="meta")

    @property
    def _is_turned(self) -> bool:
        """Whether files have the matrix transposed."""
        return issubclass(self.source_cls, Conv1D)

    def take_matrix(self, values: Tensor) -> None:
        """Quantize what a file has of the matrix; keep the scales, and of the bits those that this process has."""
        matrix = values.detach().to(self.compute_dtype)
        bits, self.kept.state = self._quantized(matrix.T if self._is_turned else matrix)
        set_local(self.weight, bits)

    def dequantize(self) -> Tensor:
        """Return what the bits stand for, where they are whole."""
        return self.standing_for(self.weight)

    @property
    def W_q(self) -> Tensor:
        """The bits: by this name PEFT knows a layer that is asked to dequantize itself."""
        return self.weight

    def standing_for(self, bits: Tensor) -> Tensor:
        """Return the matrix that bits, which are whole, stand for."""
        raise NotImplementedError

    def begin(self) -> None:
        """Have a placeholder for the bits."""
        raise NotImplementedError

    def _quantized(self, matrix: Tensor) -> tuple[Tensor, Any]:
        """Return the bits of a matrix, and its scales as bitsandbytes keeps them."""
        raise NotImplementedError

    def _saved_scales(self) -> dict[str, Tensor]:
        """Return the scales under the names that bitsandbytes saves them by."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.kept.state is not None:
            destination |= {prefix + name: scales.detach() for name, scales in self._saved_scales().items()}


class Linear4bitSharded(_Sharded, Linear4bit):  # type: ignore[misc]
    """A layer with 4 bits a weight.

    Attributes:
        how: The settings of the quantization, as bitsandbytes names them.
    """

    how: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the run's precision; return what came in."""
        inputs = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        product: Tensor = matmul_4bit(inputs, self.weight, self.kept.state, bias=bias)
        return product.to(x.dtype)

    def standing_for(self, bits: Tensor) -> Tensor:
        """Return the matrix that bits, which are whole, stand for."""
        matrix: Tensor = dequantize_4bit(bits, self.kept.state)
        return matrix

    def begin(self) -> None:
        """Have a placeholder for the bits."""
        empty = placeholder((math.ceil(self.in_features * self.out_features / 2), 1), torch.uint8)
        # PEFT looks at how it is quantized.
        self.weight = Params4bit(empty, bnb_quantized=True, **self.how)

    def _quantized(self, matrix: Tensor) -> tuple[Tensor, Any]:
        few = Params4bit(matrix, **self.how).to(self.weight.device)
        return few.data, few.quant_state

    def _saved_scales(self) -> dict[str, Tensor]:
        return {f"weight.{name}": scales for name, scales in self.kept.state.as_dict(packed=True).items()}


class Linear8bitSharded(_Sharded, Linear8bitRows):
    """A layer with 8 bits a weight."""

    @property
    def scales(self) -> Tensor:
        """The largest absolute value of each row."""
        found: Tensor = self.kept.state
        return found

    def standing_for(self, bits: Tensor) -> Tensor:
        """Return the matrix that bits, which are whole, stand for."""
        matrix: Tensor = int8_vectorwise_dequant(bits, self.scales)
        return matrix

    def begin(self) -> None:
        """Have a placeholder for the bits."""
        self.weight = Parameter(placeholder((self.out_features, self.in_features), torch.int8), requires_grad=False)

    def _quantized(self, matrix: Tensor) -> tuple[Tensor, Any]:
        few = Int8Params(matrix.to("cpu"), requires_grad=False).to(self.weight.device)
        return few.data, few.SCB

    def _saved_scales(self) -> dict[str, Tensor]:
        return {"SCB": self.scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def lay_out(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Let the quantized layers of a model without weights have bits that can be sharded."""
    how = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": config.bnb_4bit_quant_type}
    for layer in quantized_layers(model).values():
        if isinstance(layer, Linear4bit):
            layer.__class__, layer.how = Linear4bitSharded, how
        else:
            layer.__class__ = Linear8bitSharded
        layer.kept = Scales()
        layer.begin()
