"""The layers of LoRA and DoRA as PEFT makes them, made exact, and quick.

PEFT is optional: import this module inside functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dpo_cli.modeling.folders.shard_files import gathered
from dpo_cli.modeling.shards import is_placeholder
from dpo_cli.modeling.split import set_whole_value


class QuickLinear(lora.Linear):  # type: ignore[misc]
    """LoRA beside a linear layer: the product of B is added to that of the base where that is written.

    PEFT writes the product, its multiple and the sum one after the other, and autograd does so with the gradients. On a
    CPU, a step of a small model with rank 16 takes 4 % less time without.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Answer as PEFT's layer, which is called where anything is out of the ordinary."""
        if args or kwargs or not self._is_plain(x):
            answer: Tensor = super().forward(x, *args, **kwargs)
            return answer
        (name,) = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        summed: Tensor = _Sum.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
        return summed

    def _is_plain(self, x: Tensor) -> bool:
        """Tell whether the layer answers x Wᵀ + b + s · x Aᵀ Bᵀ for a frozen W, all of it in one dtype."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant or self._drops_out(names[0]):
            return False
        # A compiler fuses what PEFT writes.
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or type(base) is not nn.Linear:
            return False
        weights = [base.weight, self.lora_A[names[0]].weight, self.lora_B[names[0]].weight]
        trains = torch.is_grad_enabled() and any(one.requires_grad for one in base.parameters())
        return not trains and all(one.dtype == x.dtype for one in weights)

    def _drops_out(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return not isinstance(dropout, nn.Identity) and dropout.training


class _Sum(torch.autograd.Function):
    """x Wᵀ + b + s · x Aᵀ Bᵀ; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return `[…, out]` for x `[…, in]`, W `[out, in]`, A `[r, in]` and B `[out, r]`."""
        y = functional.linear(x, weight, bias).contiguous()
        low, rows = functional.linear(x.flatten(0, -2), a), y.view(-1, y.shape[-1])
        torch.addmm(rows, low, b.T, alpha=scale, out=rows)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With G the gradient of the output: dA = s · Bᵀ Gᵀ x, dB = s · Gᵀ x Aᵀ, dx = G W + s · G B A."""
        x, low, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        low_gradient = (gradient @ b).mul_(ctx.scale)
        da = low_gradient.T @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        db = (gradient.T @ low).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ weight
            dx = torch.addmm(dx, low_gradient, a, out=dx).view_as(x)
        return dx, None, None, da, db, None


def refine(layer: Any) -> None:
    """Let DoRA begin as the base, and a layer without it keep no copy of its input in another dtype."""
    _measure_norms(layer)
    if type(layer) is lora.Linear:
        layer.__class__ = QuickLinear
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
        if norms.weight.is_meta or is_placeholder(layer.get_base_layer().weight):
            continue
        factors = {"lora_A": layer.lora_A[name].weight, "lora_B": layer.lora_B[name].weight}
        norms.update_layer(base_layer=layer.get_base_layer(), scaling=layer.scaling[name], **factors)


@torch.no_grad()
def settle_norms(layer: Any) -> None:
    """Set the norms that DoRA trains to those of the base's rows, in float32, where B is 0."""
    for norms in layer.lora_magnitude_vector.values():
        base = layer.get_base_layer()
        whole = gathered(base.weight)
        whole = base.standing_for(whole) if hasattr(base, "standing_for") else whole
        rows = whole.T if getattr(layer, "fan_in_fan_out", False) else whole
        set_whole_value(norms.weight, torch.linalg.vector_norm(rows.float(), dim=1))
