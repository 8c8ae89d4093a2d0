"""The optimizers, of which `Optimizer` lists all, and the learning rate over the steps.

This file is read with the configuration, before torch is needed: import torch inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dpo_cli.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim.lr_scheduler import LambdaLR

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
"""Where torch has AdamW as a single kernel."""

Groups = list[dict[str, Any]]
"""Parameters, and the weight decay that they have."""

Decay = Annotated[float, Field(ge=0, lt=1)]
"""What a running mean keeps of itself at a step."""

Eps = Annotated[float, Field(gt=0)]
"""What keeps a division from being one by zero."""


class OptimizerSettings(Settings):
    """What all optimizers have in common."""

    one_by_one: ClassVar[bool] = False
    """Whether it has to step on one weight after the other however they are held."""
    on_shards: ClassVar[bool] = True
    """Whether it can step on a part of a weight that is sharded among processes."""
    gradients: ClassVar[Literal["float32", "bfloat16"]] = "float32"
    """What gradients of weights of fewer than 32 bits are added up in."""
    kept_in: ClassVar[str] = "float32"
    """What is kept of a parameter is held in, in words."""

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's optimizer."""
        raise NotImplementedError

    def state_numbers(self, parameter: Tensor) -> int:
        """Return how many numbers are kept of a parameter."""
        raise NotImplementedError

    def over(
        self, trained: Sequence[Parameter], learning_rate: float, weight_decay: float, *, on_host: bool = False
    ) -> torch.optim.Optimizer:
        """Return the optimizer of parameters; biases and norms are not decayed.

        Args:
            trained: The parameters.
            learning_rate: The highest.
            weight_decay: That of matrices.
            on_host: Whether the state stays in the host's memory between steps.
        """
        from dpo_cli.modeling.split import low_bits
        from dpo_cli.modeling.stepping import OneByOne

        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not (self.one_by_one or on_host) and all(low_bits(p) is None for p in trained):
            return self.build(groups, learning_rate)
        return OneByOne(lambda stand_ins: self.build(stand_ins, learning_rate), groups, on_host=on_host)

    def state_bytes(self, trained: Sequence[Tensor]) -> int:
        """Return what is kept of parameters, in bytes: of those with fewer bits, that of the whole values."""
        return sum(self.state_numbers(p) * max(p.element_size(), 4) for p in trained)


class AdamW(OptimizerSettings):
    """AdamW, which keeps two numbers per weight.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101.
    """

    type: Literal["adamw"] = "adamw"
    """Which optimizer."""
    betas: list[Decay] = Field([0.9, 0.999], min_length=2, max_length=2)
    """The decay of the running means of the gradient and of its square."""
    eps: Eps = 1e-8
    """Added to the root of the mean square."""

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's, as a single kernel where there is one."""
        from torch.optim import AdamW as TorchAdamW

        fused = all(p.device.type in _FUSED_DEVICES for group in groups for p in group["params"])
        betas = self.betas[0], self.betas[1]
        return TorchAdamW(groups, lr=learning_rate, betas=betas, eps=self.eps, fused=fused)

    def state_numbers(self, parameter: Tensor) -> int:
        """Count both means."""
        return 2 * parameter.numel()


class AdamW8bit(OptimizerSettings):
    """AdamW with its two numbers per weight in 8 bits each, those of norms, biases and small matrices aside.

    Source: Dettmers et al. 2021, arXiv 2110.02861.
    """

    type: Literal["adamw_8bit"] = "adamw_8bit"
    """Which optimizer."""
    betas: list[Decay] = Field([0.9, 0.999], min_length=2, max_length=2)
    """The decay of the running means of the gradient and of its square."""
    eps: Eps = 1e-8
    """Added to the root of the mean square."""

    # Torch would load what it kept as numbers of the dtype of the weights.
    one_by_one: ClassVar[bool] = True
    gradients: ClassVar[Literal["float32", "bfloat16"]] = "bfloat16"
    kept_in: ClassVar[str] = "8 bits"

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return the one over the kernels of bitsandbytes."""
        from dpo_cli.modeling.eight_bits import BlockwiseAdamW

        return BlockwiseAdamW(groups, learning_rate, (self.betas[0], self.betas[1]), self.eps)

    def state_bytes(self, trained: Sequence[Tensor]) -> int:
        """Count both means, and the scales of their blocks."""
        from dpo_cli.modeling.eight_bits import moment_bytes

        return sum(map(moment_bytes, trained))


class Adafactor(OptimizerSettings):
    """Adafactor, which keeps only the means of a matrix's rows and columns.

    Source: Shazeer and Stern 2018, arXiv 1804.04235.
    """

    type: Literal["adafactor"] = "adafactor"
    """Which optimizer."""
    beta2_decay: float = Field(-0.8, ge=-1, lt=0)
    """The decay of the running mean of the gradient's square at step t is 1 − t^beta2_decay."""
    eps1: Eps | None = None
    """Added to the gradient's squares; null: the machine epsilon of the weights' dtype."""
    eps2: Eps = 1e-3
    """The lower limit of the root mean square of a matrix's weights, which scales the learning rate."""
    d: float = Field(1.0, ge=1)
    """Updates whose root mean square is larger, before the learning rate, are scaled down to it."""

    # It looks at whole rows and columns, and at the size of all weights of a matrix.
    on_shards: ClassVar[bool] = False

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's."""
        from torch.optim import Adafactor as TorchAdafactor

        eps = self.eps1, self.eps2
        return TorchAdafactor(groups, lr=learning_rate, beta2_decay=self.beta2_decay, eps=eps, d=self.d)

    def state_numbers(self, parameter: Tensor) -> int:
        """Count rows and columns of a matrix; of anything else all numbers."""
        size = parameter.numel()
        return size // parameter.shape[-1] + size // parameter.shape[-2] if parameter.ndim >= 2 else size


class RMSprop(OptimizerSettings):
    """RMSprop, which keeps one number per weight; DPO was first trained with it. Weight decay is added to the gradient.

    Source: Hinton 2012, lecture 6e.
    """

    type: Literal["rmsprop"] = "rmsprop"
    """Which optimizer."""
    alpha: Decay = 0.99
    """The decay of the running mean of the gradient's square."""
    eps: Eps = 1e-8
    """Added to the root of that mean."""
    momentum: Decay = 0.0
    """The share of the previous step in a step; above 0, a second number per weight is kept."""
    centered: bool = False
    """Divide by the gradient's standard deviation instead; one more number per weight is kept."""

    def build(self, groups: Groups, learning_rate: float) -> torch.optim.Optimizer:
        """Return torch's."""
        from torch.optim import RMSprop as TorchRMSprop

        return TorchRMSprop(groups, learning_rate, self.alpha, self.eps, momentum=self.momentum, centered=self.centered)

    def state_numbers(self, parameter: Tensor) -> int:
        """Count the mean of the squares and, where they are kept, the momentum and the gradient's mean."""
        return (1 + (self.momentum > 0) + self.centered) * parameter.numel()


Optimizer = Annotated[AdamW | AdamW8bit | Adafactor | RMSprop, Field(discriminator="type")]
"""The closed union of all optimizers, told apart by `type`."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
}
"""All ways that the learning rate takes after the warm-up: the share of the highest one, by progress from 0 to 1."""


def warmup_steps(ratio: float, num_steps: int) -> int:
    """Return over how many steps the learning rate rises."""
    return math.ceil(Fraction(str(ratio)) * num_steps)


def rate_factor(kind: str, warmup_ratio: float, num_steps: int) -> Callable[[int], float]:
    """Return the function that gives the share of the highest learning rate for the step after some steps.

    Over the first `warmup_ratio` of the steps the rate rises evenly, from its first share and not from
    zero, so that no step is wasted. Then it goes on as one of `SCHEDULES` says: it stays (`constant`), falls evenly
    (`linear`) or along half a cosine (`cosine`), and would be zero at the step after the last.
    """
    num_warmup, after = warmup_steps(warmup_ratio, num_steps), SCHEDULES[kind]

    def factor(steps_done: int) -> float:
        if steps_done < num_warmup:
            return (steps_done + 1) / num_warmup
        return after(min(1.0, (steps_done - num_warmup) / max(1, num_steps - num_warmup)))

    return factor


def schedule(optimizer: torch.optim.Optimizer, kind: str, warmup_ratio: float, num_steps: int) -> LambdaLR:
    """Return the schedule of the learning rate, `rate_factor`, to be stepped once after every optimizer step."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, rate_factor(kind, warmup_ratio, num_steps))
