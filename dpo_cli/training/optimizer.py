"""AdamW, its learning rate over the steps, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where torch has AdamW as a single kernel."""


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> AdamW:
    """Return AdamW over a model's parameters; biases and norms are not decayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in _FUSED_DEVICES for parameter in trained)
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=fused)


def state_bytes(model: nn.Module) -> int:
    """Return what AdamW keeps of a model's parameters, in bytes: two moments of each."""
    return 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def schedule(optimizer: torch.optim.Optimizer, kind: str, warmup_ratio: float, num_steps: int) -> LambdaLR:
    """Return the schedule of the learning rate, to be stepped once after every optimizer step.

    Over the first `warmup_ratio` of the steps the rate rises evenly, from its first share and not from
    zero, so that no step is wasted. Then it stays (`constant`), falls evenly (`linear`) or along half a
    cosine (`cosine`), and would be zero at the step after the last.
    """
    warmup_steps = math.ceil(Fraction(str(warmup_ratio)) * num_steps)
    after: Callable[[float], float] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
    }[kind]

    def factor(steps_done: int) -> float:
        if steps_done < warmup_steps:
            return (steps_done + 1) / warmup_steps
        return after(min(1.0, (steps_done - warmup_steps) / max(1, num_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)
