"""How fast a model trains and scores: measured on a few of its layers, before its weights are loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.depths import shallow
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.memory import free_bytes
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import Scorer, recompute_activations

_FEW, _MORE = 1, 5
"""Layers of the two models that are measured; what all layers take is extrapolated from their difference."""

_BESIDE = 3
"""What is held beside weights that train: gradients, and two numbers that AdamW keeps."""

_SHARE_OF_FREE = 0.5
_REPEATS = 2

_ENOUGH_TOKENS_ON_CPU, _ENOUGH_TOKENS = 512, 16384
"""Tokens of a forward pass beyond which training gains no speed worth its memory."""


@dataclass(frozen=True)
class Pace:
    """What a model takes on this machine, in seconds.

    Attributes:
        training: Of a forward and a backward pass over some pairs.
        scoring: Of a forward pass over them without gradient.
        update: Of one optimizer step.
    """

    training: float
    scoring: float
    update: float


def enough_tokens(device: torch.device) -> int:
    """Return the fewest tokens of a forward pass with which training runs at nearly its best speed.

    What a pass gains from more tokens is that gradients are added up less often, which takes as long for few tokens as
    for many. How many make it less than a hundredth of a pass depends on the device alone: on how many
    multiplications it does in the time of reading a number.
    """
    return _ENOUGH_TOKENS_ON_CPU if device.type == "cpu" else _ENOUGH_TOKENS


def measured_layers(model: PreTrainedModel) -> list[int]:
    """Return how many layers the models have that `measure_pace` measures: all of them where they are few."""
    num_layers = model.config.get_text_config().num_hidden_layers
    return [num_layers] if num_layers <= _MORE else [_FEW, _MORE]


def measure_pace(
    policy: Policy,
    layout: Layout,
    batch: PairBatch,
    autocast: Callable[[], AbstractContextManager[None]],
    build_optimizer: Callable[[list[torch.nn.Parameter]], Optimizer],
    *,
    recomputed: bool,
    collisions: bool,
) -> Pace:
    """Measure a model of the same architecture with few layers and random weights; extrapolate to all layers.

    Args:
        policy: The policy, of which the settings alone are looked at.
        layout: The batch's layout.
        batch: Pairs, on the device.
        autocast: Sets the precision.
        build_optimizer: Makes the optimizer of some weights.
        recomputed: Whether activations are computed again in the backward pass.
        collisions: As in `Scorer`.

    Raises:
        MemoryError: There is too little memory for it.
    """
    depths, num_layers = measured_layers(policy.model), policy.model.config.get_text_config().num_hidden_layers
    found = []
    for depth in depths:
        shallow = _shallow(policy, depth, batch.input_ids.device)
        layout.prepare(shallow.model)
        if recomputed:
            recompute_activations(shallow.model)
        scorer, optimizer = Scorer(shallow.model, collisions=collisions), build_optimizer(shallow.weights.trained())
        found.append(_seconds(scorer, batch, autocast, shallow.weights.training_pass, optimizer))
        del shallow
    few, more = found[0], found[-1]
    times = (num_layers - depths[0]) / max(1, depths[-1] - depths[0])
    return Pace(*(max(b, a + (b - a) * times) for a, b in zip(few, more, strict=True)))


def _seconds(
    scorer: Scorer,
    batch: PairBatch,
    autocast: Callable[[], AbstractContextManager[None]],
    training_pass: Callable[[], AbstractContextManager[None]],
    optimizer: Optimizer,
) -> tuple[float, float, float]:
    """Return the seconds of a pass with gradient, of one without, and of an optimizer step."""

    def train() -> None:
        with autocast(), training_pass():
            logps = scorer(batch)
        logps.sum().backward()

    @torch.no_grad()
    def score() -> None:
        with autocast():
            scorer(batch)

    return _shortest_seconds(train), _shortest_seconds(score), _shortest_seconds(optimizer.step)


def _shortest_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of a few."""
    best = math.inf
    for _ in range(_REPEATS):
        _finish()
        started = time.perf_counter()
        work()
        _finish()
        best = min(best, time.perf_counter() - started)
    return best


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shallow(policy: Policy, num_layers: int, device: torch.device) -> Policy:
    """Build the policy with its first layers alone, and random weights.

    Raises:
        MemoryError: There is too little memory for it.
    """
    config = shallow(policy.model.config, num_layers)
    sizes = policy.sketched(config).sizes()
    if sizes.held + _BESIDE * sizes.trained > _SHARE_OF_FREE * free_bytes(device):
        raise MemoryError("too little memory is free to measure it")
    return policy.untrained(config, device)
