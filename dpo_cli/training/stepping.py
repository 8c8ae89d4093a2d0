"""An optimizer that steps on one weight after the other, where it cannot step on all of them as they are held.

Weights that are split are merged for their step, and split again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from dpo_cli.modeling.split import set_whole_value, whole_value

Groups = list[dict[str, Any]]


class OneByOne(Optimizer):
    """Takes the steps of another optimizer, one weight at a time; its state is that of the other.

    Args:
        build: Makes the other optimizer of groups of parameters.
        groups: Those that train. A stand-in has the whole value of each while it is stepped on.
    """

    def __init__(self, build: Callable[[Groups], Optimizer], groups: Groups) -> None:
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
                    self._step_on(weights, group)

    def _step_on(self, weights: Parameter, group: dict[str, Any]) -> None:
        inner, stand_in = self._inner, self._stand_ins[weights]
        stand_in.data, stand_in.grad = whole_value(weights), weights.grad
        inner.param_groups = [{**group, "params": [stand_in]}]
        inner.state[stand_in] = self.state[weights]
        inner.step()
        set_whole_value(weights, stand_in.data)
        self.state[weights] = inner.state.pop(stand_in)
        stand_in.data, stand_in.grad = stand_in.data.new_empty(0), None

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
                name: value.to(weights.device, copy=True) if value.ndim or fused else value.clone()
                for name, value in kept.items()
            }


def _stand_in(weights: Parameter) -> Parameter:
    """Return a parameter without content that takes the whole value of another, and a gradient of whatever dtype."""
    stand_in = Parameter(torch.empty(0, dtype=torch.float32, device=weights.device))
    stand_in.grad_dtype = None
    return stand_in
