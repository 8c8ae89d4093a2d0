"""An optimizer that steps on one weight after the other, where it cannot step on all of them as they are held.

Weights that are split are merged for their step, and split again. What is kept of them may stay in the host's memory:
it comes to the device for its step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dpo_cli.modeling.shards import is_sharded, local
from dpo_cli.modeling.split import on_host, set_whole_value, whole_value

Groups = list[dict[str, Any]]


class OneByOne(Optimizer):
    """Takes the steps of another optimizer, one weight at a time; its state is that of the other.

    Args:
        build: Makes the other optimizer of groups of parameters.
        groups: Those that train. A stand-in has the whole value of each while it is stepped on.
        on_host: Whether the state stays in the host's memory between steps.
    """

    def __init__(self, build: Callable[[Groups], Optimizer], groups: Groups, *, on_host: bool = False) -> None:
        self._on_host = on_host
        trained = [weights for group in groups for weights in group["params"]]
        self._stand_ins = {weights: _stand_in(weights) for weights in trained}
        self._inner = build([{**group, "params": [self._stand_ins[p] for p in group["params"]]} for group in groups])
        settled = zip(self._inner.param_groups, groups, strict=True)
        super().__init__([{**inner, "params": group["params"]} for inner, group in settled], self._inner.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on every weight that has a gradient."""
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._step_on(weights, weights.grad, group)

    def _step_on(self, weights: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        inner, stand_in = self._inner, self._stand_ins[weights]
        stand_in.data, stand_in.grad = whole_value(weights), local(gradient)
        inner.param_groups = [{**group, "params": [stand_in]}]
        inner.state[stand_in] = self._brought(self.state[weights], weights.device)
        inner.step()
        # Of a weight that is sharded over processes, what is here was stepped on where it is.
        if not is_sharded(weights):
            set_whole_value(weights, stand_in.data)
        self.state[weights] = self._taken_back(inner.state.pop(stand_in), self.state[weights])
        stand_in.data, stand_in.grad = stand_in.data.new_empty(0), None

    def _brought(self, state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return the state of a weight where it is stepped on."""
        if not self._on_host:
            return state
        return {
            name: kept.to(device, non_blocking=True, copy=True) if kept.ndim else kept for name, kept in state.items()
        }

    def _taken_back(self, state: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of a weight where it is kept, in the memory that it had there."""
        if not self._on_host:
            return state
        return {
            name: one if not one.ndim else kept[name].copy_(one, non_blocking=True) if name in kept else on_host(one)
            for name, one in state.items()
        }

    def kept_on(self, device: torch.device) -> torch.device:
        """Return where the state of weights is kept that are on a device."""
        return torch.device("cpu") if self._on_host else device

    def state_dict(self) -> dict[str, Any]:
        """Return the state, all of which has arrived where it is kept."""
        if self._on_host and torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: it is kept as it was saved, whatever the dtype of the weights."""
        trained = [weights for group in self.param_groups for weights in group["params"]]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.state.clear()
        fused = bool(self.defaults.get("fused"))
        for index, kept in state_dict["state"].items():
            weights = trained[index]
            self.state[weights] = {
                name: self._settled(value, weights.device) if value.ndim or fused else value.clone()
                for name, value in kept.items()
            }

    def _settled(self, value: Tensor, device: torch.device) -> Tensor:
        """Return what was saved, where it is kept: moments, as torch's own optimizers, in the memory that they have."""
        if not value.ndim:
            return value.to(device, copy=True)
        return on_host(value.to(device)) if self._on_host else value.to(device)


def _stand_in(weights: Parameter) -> Parameter:
    """Return a parameter without content that takes the whole value of another, and a gradient of whatever dtype."""
    stand_in: Any = Parameter(torch.empty(0, dtype=torch.float32, device=weights.device))
    stand_in.grad_dtype = None
    stand_in.whole_numbers = weights.numel()
    made: Parameter = stand_in
    return made
