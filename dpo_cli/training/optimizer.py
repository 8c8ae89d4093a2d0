"""The optimizers, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where torch has AdamW as a single kernel."""


@dataclass(frozen=True)
class OptimizerKind:
    """One way to turn gradients into steps.

    Attributes:
        build: Makes it of groups of parameters and a learning rate.
        state_numbers: How many numbers it keeps of a parameter.
    """

    build: Callable[[list[dict[str, Any]], float], Optimizer]
    state_numbers: Callable[[Tensor], int]


def _adamw(groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
    fused = all(p.device.type in _FUSED_DEVICES for group in groups for p in group["params"])
    return AdamW(groups, lr=learning_rate, fused=fused)


OPTIMIZERS = {
    # Loshchilov and Hutter 2017, arXiv 1711.05101.
    "adamw": OptimizerKind(_adamw, lambda p: 2 * p.numel()),
    # Shazeer and Stern 2018, arXiv 1804.04235: of a matrix only the means of rows and columns are kept.
    "adafactor": OptimizerKind(
        lambda groups, rate: Adafactor(groups, lr=rate),
        lambda p: p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim >= 2 else p.numel(),
    ),
    # Hinton 2012, lecture 6e; what DPO was first trained with. Its weight decay is added to the gradient.
    "rmsprop": OptimizerKind(lambda groups, rate: RMSprop(groups, lr=rate), lambda p: p.numel()),
}


def optimizer(kind: str, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """Return one of `OPTIMIZERS` over a model's parameters; biases and norms are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[kind].build([group for group in groups if group["params"]], learning_rate)


def state_bytes(kind: str, model: nn.Module) -> int:
    """Return what an optimizer keeps of a model's parameters, in bytes."""
    numbers = OPTIMIZERS[kind].state_numbers
    return sum(numbers(p) * p.element_size() for p in model.parameters() if p.requires_grad)


def warmup_steps(ratio: float, num_steps: int) -> int:
    """Return over how many steps the learning rate rises."""
    return math.ceil(Fraction(str(ratio)) * num_steps)


def rate_factor(kind: str, warmup_ratio: float, num_steps: int) -> Callable[[int], float]:
    """Return the function that gives the share of the highest learning rate for the step after some steps.

    Over the first `warmup_ratio` of the steps the rate rises evenly, from its first share and not from
    zero, so that no step is wasted. Then it stays (`constant`), falls evenly (`linear`) or along half a
    cosine (`cosine`), and would be zero at the step after the last.
    """
    num_warmup = warmup_steps(warmup_ratio, num_steps)
    after: Callable[[float], float] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
    }[kind]

    def factor(steps_done: int) -> float:
        if steps_done < num_warmup:
            return (steps_done + 1) / num_warmup
        return after(min(1.0, (steps_done - num_warmup) / max(1, num_steps - num_warmup)))

    return factor


def schedule(optimizer: Optimizer, kind: str, warmup_ratio: float, num_steps: int) -> LambdaLR:
    """Return the schedule of the learning rate, `rate_factor`, to be stepped once after every optimizer step."""
    return LambdaLR(optimizer, rate_factor(kind, warmup_ratio, num_steps))
