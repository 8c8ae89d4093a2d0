"""AdamW whose moments are held in 8 bits, in blocks that have a scale each.

Source: Dettmers et al. 2021, arXiv 2110.02861; the kernels are those of bitsandbytes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from dpo_cli.modeling.extras import import_bitsandbytes

BLOCK = 256
"""How many moments have a scale in common."""
FEWEST = 4096
"""Norms, biases and what is smaller keep float32 moments: they are few, and the model depends on each."""
_STRETCH = 2**16 * BLOCK
"""How many weights are stepped on at once: of so many, a float32 gradient is made."""
MOMENTS = ("exp_avg", "exp_avg_sq")
IN_8_BITS, SCALE = "_8bit", "_scale"
"""What the names of moments end with that are held in 8 bits, and those of their scales."""


def in_8_bits(weights: Tensor) -> bool:
    """Tell whether the moments of a weight are held in 8 bits; of one that is sharded, the whole counts."""
    return weights.ndim >= 2 and getattr(weights, "whole_numbers", weights.numel()) >= FEWEST


def num_blocks(numbers: int) -> int:
    """Return how many blocks so many moments are, the last maybe shorter."""
    return -(-numbers // BLOCK)


def moment_bytes(weights: Tensor) -> int:
    """Return what the moments of a weight take."""
    numbers = weights.numel()
    return len(MOMENTS) * (numbers + 4 * num_blocks(numbers) if in_8_bits(weights) else 4 * numbers)


class BlockwiseAdamW(Optimizer):
    """AdamW; gradients may have any dtype of floats.

    Args:
        groups: float32 parameters, contiguous, and the weight decay that they have.
        lr: The learning rate.
        betas: The decay of the running means of the gradient and of its square.
        eps: Added to the root of the mean square.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step of every weight that has a gradient."""
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    state = self.state[weights]
                    if not state:
                        state.update(_first_state(weights))
                    _step = _step_8bit if in_8_bits(weights) else _step_32bit
                    _step(weights, state, group)


def _first_state(weights: Tensor) -> dict[str, Tensor]:
    """Return moments of 0."""
    state = {"step": torch.zeros(())}
    for name in MOMENTS:
        if in_8_bits(weights):
            state[f"{name}{IN_8_BITS}"] = torch.zeros_like(weights, dtype=torch.uint8)
            state[f"{name}{SCALE}"] = weights.new_zeros(num_blocks(weights.numel()))
        else:
            state[name] = torch.zeros_like(weights)
    return state


def _step_32bit(weights: Any, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    (beta1, beta2), (first, second) = group["betas"], (state[name] for name in MOMENTS)
    adamw(
        [weights], [weights.grad.float()], [first], [second], [], [state["step"]], amsgrad=False, beta1=beta1,
        beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip


def _step_8bit(weights: Any, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    state["step"] += 1
    flat = (weights.view(-1), weights.grad.reshape(-1), *(state[f"{name}{IN_8_BITS}"].view(-1) for name in MOMENTS))
    scales = (state[f"{name}{SCALE}"].split(_STRETCH // BLOCK) for name in MOMENTS)
    beta1, beta2 = group["betas"]
    signed, unsigned = (_codes(weights.device, signed) for signed in (True, False))
    for part, gradient, first, second, scale1, scale2 in zip(*(t.split(_STRETCH) for t in flat), *scales, strict=True):
        optimizer_update_8bit_blockwise(
            "adam", gradient.float(), part, first, second, beta1, beta2, 0.0, 0.0, group["eps"], int(state["step"]),
            group["lr"], signed, unsigned, scale1, scale2, group["weight_decay"],
        )  # fmt: skip


@functools.cache
def _codes(device: torch.device, signed: bool) -> Tensor:
    """Return the numbers that 8 bits stand for, as parts of their block's scale."""
    import_bitsandbytes()
    from bitsandbytes.functional import create_dynamic_map

    codes: Tensor = create_dynamic_map(signed=signed).to(device)
    return codes
