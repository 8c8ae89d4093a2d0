"""Where weights are, among the processes of a run: `Placement` at the end lists the ways.

A way wraps what answers, adds gradients up over a step and over the processes, clips them, and makes weights whole
where they are saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_

from dpo_cli.modeling.data_ranks import data_rank
from dpo_cli.modeling.nothing import nothing_of
from dpo_cli.modeling.shards import SHARD, local, mesh_of, spread

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn import Parameter

    from dpo_cli.modeling.scorer import Scorer

_EPS = 1e-6
"""Added to a norm before it divides, as torch's own clipping does."""


@dataclass(frozen=True)
class Alone:
    """One process has all weights.

    Attributes:
        accelerator: Knows device and precision.
    """

    accelerator: Accelerator
    is_sharded: ClassVar[bool] = False

    @classmethod
    def of(cls, accelerator: Accelerator, sharding: str) -> Self | None:
        """Return it where it is for as many processes as there are, and weights that are sharded in this way."""
        return cls(accelerator) if accelerator.num_processes == 1 else None

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

    def begin_step(self) -> None:
        """Begin a step that may be broken off."""

    def rejoin(self, scorer: nn.Module) -> None:
        """Take part in the exchange of a step's gradients, wherever the passes of this process were broken off."""

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


@dataclass(frozen=True)
class Replicated(Alone):
    """Every process has all weights; gradients are averaged on the last pass of a step.

    Attributes:
        exchanged: The weights whose gradients have gone to torch for averaging in the step at hand.
    """

    exchanged: set[Parameter] = field(default_factory=set, compare=False)

    @classmethod
    def of(cls, accelerator: Accelerator, sharding: str) -> Self | None:
        """Return it where it is for as many processes as there are, and weights that are sharded in this way."""
        return cls(accelerator) if accelerator.num_processes > 1 and sharding == "none" else None

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
        return self._noted(scorer) if last else self.accelerator.no_sync(scorer)

    def begin_step(self) -> None:
        """Begin a step that may be broken off: none of its gradients were exchanged."""
        self.exchanged.clear()

    def rejoin(self, scorer: nn.Module) -> None:
        """Take part in the exchange of a step's gradients, wherever the passes of this process were broken off."""
        if not isinstance(scorer, DistributedDataParallel):
            self._average(scorer)
            return
        left = [weights for weights in scorer.parameters() if weights.requires_grad and weights not in self.exchanged]
        if not self.exchanged:
            # Torch awaits a backward pass of the whole after a forward pass.
            scorer(None, instead=lambda _: nothing_of(left)).backward()
        elif left:
            nothing_of(left).backward()

    @contextlib.contextmanager
    def _noted(self, scorer: nn.Module) -> Iterator[None]:
        """Note of which weights the gradients were exchanged, should the backward pass break off."""
        trained = [weights for weights in scorer.parameters() if weights.requires_grad]
        hooks = [weights.register_post_accumulate_grad_hook(self.exchanged.add) for weights in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _averaged(self, scorer: nn.Module) -> Iterator[None]:
        """Average the gradients over the processes after a backward pass."""
        # Not every step is one that may be broken off.
        self.exchanged.clear()
        yield
        self._average(scorer)

    def _average(self, scorer: nn.Module) -> None:
        """Average the gradients over the processes one after the other, but those of this step that were already."""
        left = [weights for weights in scorer.parameters() if weights.requires_grad and weights not in self.exchanged]
        # Memory may run out here: before the first exchange, so that this process still takes part in each.
        for weights in left:
            if weights.grad is None:
                weights.grad = torch.zeros_like(weights, dtype=weights.grad_dtype)
        for weights in left:
            gradient = weights.grad
            assert gradient is not None
            gradient /= data_rank(self.accelerator).num_ranks
            distributed.all_reduce(gradient)
            self.exchanged.add(weights)


@dataclass(frozen=True)
class Sharded(Alone):
    """Weights are sharded over processes, and so are gradients and what an optimizer keeps; by torch's FSDP2.

    A pass makes the weights of one decoder layer after the other whole, so all processes make the same passes.

    Attributes:
        mesh: The processes, as they shard weights among themselves.
    """

    mesh: DeviceMesh
    is_sharded: ClassVar[bool] = True

    @classmethod
    def of(cls, accelerator: Accelerator, sharding: str) -> Self | None:
        """Return it where weights are sharded in this way over as many processes as there are."""
        if accelerator.num_processes == 1 or sharding == "none":
            return None
        return cls(accelerator, mesh_of(accelerator.device, sharding))

    def shard(self, scorer: Scorer, computed_in: torch.dtype | None) -> None:
        """Shard the weights of what answers, whose values are left open where they are placeholders."""
        spread(scorer, self.mesh, self.accelerator.device, computed_in)

    def wrap(self, scorer: Scorer, *, trained: bool) -> nn.Module:
        """Return what answers in the run's precision: the weights are where they are already."""
        return _InPrecision(scorer, self.accelerator)

    def rejoin(self, scorer: nn.Module) -> None:
        """Refuse: in a pass that broke off, the other processes wait for this one in a layer."""
        raise AssertionError("steps on weights in shards are not cut again")

    def clip(self, trained: Iterable[Parameter], norm: float | None) -> Tensor:
        """Clip the step's gradients to a norm, or to none; return the norm before, over all processes, unread."""
        gradients = [local(weights.grad) for weights in trained if weights.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
        squares = norms.square().sum()
        distributed.all_reduce(squares, group=self.mesh.get_group(SHARD))
        total = squares.sqrt()
        if norm is not None:
            torch._foreach_mul_(gradients, (norm / (total + _EPS)).clamp(max=1.0))
        return total


class _InPrecision(nn.Module):
    """Answers as a scorer does, in the precision of the run.

    Args:
        scorer: Answers.
        accelerator: Knows the precision.
    """

    def __init__(self, scorer: Scorer, accelerator: Accelerator) -> None:
        super().__init__()
        self.scorer, self._accelerator = scorer, accelerator

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Answer."""
        with self._accelerator.autocast():
            return self.scorer(*arguments, **options)


Placement = Alone | Replicated | Sharded
"""The closed union of all placements."""


def placement_for(accelerator: Accelerator, sharding: str = "none") -> Placement:
    """Return the placement for as many processes as there are, and weights that are sharded in some way, or not."""
    found: Placement = next(filter(None, (one.of(accelerator, sharding) for one in get_args(Placement))))
    return found
