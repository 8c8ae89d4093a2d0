"""Where weights are, among the processes of a run: `Placement` at the end lists the ways.

A way wraps what answers, adds gradients up over a step and over the processes, clips them, and makes weights whole
where they are saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from dpo_cli.modeling.data_ranks import data_rank

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.nn import Parameter

    from dpo_cli.modeling.scorer import Scorer


@dataclass(frozen=True)
class Alone:
    """One process has all weights.

    Attributes:
        accelerator: Knows device and precision.
    """

    accelerator: Accelerator

    @classmethod
    def suits(cls, accelerator: Accelerator) -> bool:
        """Tell whether it is for as many processes as there are."""
        return int(accelerator.num_processes) == 1

    def wrap(self, scorer: Scorer, *, trained: bool) -> nn.Module:
        """Return what answers in the run's precision, on its device.

        Args:
            scorer: What answers.
            trained: Whether it takes gradients.
        """
        wrapped: nn.Module = self.accelerator.prepare_model(scorer, evaluation_mode=not trained)
        # Accelerate would hold it for as long as the process lives: a reference whose answers are known, for one.
        self.accelerator._models.remove(scorer)
        return wrapped

    def adding_up(self, scorer: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a backward pass whose gradients are added to those of the step's passes before it."""
        return contextlib.nullcontext()

    def clip(self, trained: Iterable[Parameter], norm: float | None) -> Tensor:
        """Clip the step's gradients to a norm, or to none; return the norm before, over all processes, unread."""
        trained = list(trained)
        gradients = [weights.grad for weights in trained if weights.grad is not None]
        if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
            before: Tensor = self.accelerator.clip_grad_norm_(trained, norm or math.inf)
            return before
        # Torch would round each norm to bfloat16.
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
        total: Tensor = torch.linalg.vector_norm(norms)
        clip_grads_with_norm_(trained, norm or math.inf, total)
        return total

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights made whole, those that other processes have included."""
        return dict(state)

    def gathered_bytes(self, held: int) -> int:
        """Return what a forward pass holds for a time of weights that other processes have."""
        return 0

    def everywhere(self, holds: bool) -> bool:
        """Tell whether something holds of the weights of all processes."""
        return holds


@dataclass(frozen=True)
class Replicated(Alone):
    """Every process has all weights; gradients are averaged on the last pass of a step."""

    @classmethod
    def suits(cls, accelerator: Accelerator) -> bool:
        """Tell whether it is for as many processes as there are."""
        return int(accelerator.num_processes) > 1

    def wrap(self, scorer: Scorer, *, trained: bool) -> nn.Module:
        """Return what answers, and averages gradients over the processes where it takes any."""
        # Torch's own averaging knows no gradient of another dtype than its weight's.
        alike = all(one.grad_dtype in (None, one.dtype) for one in scorer.parameters() if one.requires_grad)
        wrapped = super().wrap(scorer, trained=trained and alike)
        if isinstance(wrapped, DistributedDataParallel):
            # A model's buffers are constants; sending them around would tie ranks to the same number of passes.
            wrapped.broadcast_buffers = False
        return wrapped

    def adding_up(self, scorer: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a backward pass: gradients are exchanged once, on the last."""
        if not isinstance(scorer, DistributedDataParallel):
            return self._averaged(scorer) if last else contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(scorer)

    @contextlib.contextmanager
    def _averaged(self, scorer: nn.Module) -> Iterator[None]:
        """Average the gradients over the processes after a backward pass, one after the other."""
        yield
        for weights in scorer.parameters():
            if weights.requires_grad:
                if weights.grad is None:
                    weights.grad = torch.zeros_like(weights, dtype=weights.grad_dtype)
                weights.grad /= data_rank(self.accelerator).num_ranks
                distributed.all_reduce(weights.grad)


Placement = Alone | Replicated
"""The closed union of all placements."""


def placement_for(accelerator: Accelerator) -> Placement:
    """Return the placement for as many processes as there are."""
    found: Placement = next(one for one in get_args(Placement) if one.suits(accelerator))(accelerator)
    return found
