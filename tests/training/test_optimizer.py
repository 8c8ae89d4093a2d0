"""The learning rate over the steps, and what is decayed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.training.optimizer import OPTIMIZERS, optimizer, schedule, state_bytes
from dpo_cli.training.state import _optimizer_from_tensors, _optimizer_to_tensors


def rates(kind, warmup_ratio, num_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, kind, warmup_ratio, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_warm_up_rises_evenly_and_wastes_no_step():
    assert rates("constant", 0.4, 10) == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0] * 6)


def test_a_decimal_share_of_warm_up_is_taken_as_written():
    assert rates("constant", 0.07, 100).index(2.0) == 6


def test_linear_falls_evenly_to_zero_after_the_last_step():
    assert rates("linear", 0.0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("linear", 0.5, 4) == pytest.approx([1.0, 2.0, 2.0, 1.0])


def test_cosine_falls_along_half_a_cosine():
    assert rates("cosine", 0.0, 4) == pytest.approx([1 + math.cos(math.pi * k / 4) for k in range(4)])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_no_rate_is_zero_or_above_the_highest(kind):
    for num_steps in (1, 2, 7):
        for ratio in (0.0, 0.1, 0.9):
            assert all(0 < rate <= 2.0 for rate in rates(kind, ratio, num_steps))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_reaches_matrices_and_leaves_biases_and_norms(kind):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(optimizer(kind, model, 0.1, 0.5), model, lambda p: torch.zeros_like(p))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == {"0.weight"}
    if kind == "adamw":
        torch.testing.assert_close(model[0].weight.detach(), before["0.weight"] * (1 - 0.1 * 0.5))


def step(chosen, model, gradient):
    for p in model.parameters():
        p.grad = gradient(p)
    chosen.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_what_the_estimate_says(kind):
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.LayerNorm(50))
    chosen = optimizer(kind, model, 0.1, 0.0)
    step(chosen, model, torch.ones_like)
    kept = sum(v.nbytes for state in chosen.state.values() for v in state.values() if v.ndim > 0)
    assert state_bytes(kind, model) == kept


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(kind, tmp_path):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 5)
        return model, optimizer(kind, model, 0.1, 0.01)

    def go_on(model, chosen, steps):
        for number in steps:
            torch.manual_seed(number)
            step(chosen, model, torch.randn_like)

    whole, chosen = start()
    go_on(whole, chosen, range(5))
    first, chosen = start()
    go_on(first, chosen, range(2))
    tensors, groups = _optimizer_to_tensors(chosen.state_dict())
    save_file(tensors, tmp_path / "optimizer.safetensors")
    second, chosen = start()
    second.load_state_dict(first.state_dict())
    saved = load_file(tmp_path / "optimizer.safetensors")
    chosen.load_state_dict(_optimizer_from_tensors(saved, json.loads(json.dumps(groups))))
    go_on(second, chosen, range(2, 5))
    assert torch.equal(second.weight, whole.weight)


def test_every_optimizer_can_be_asked_for():
    assert TrainingSettings.model_json_schema()["properties"]["optimizer"]["enum"] == list(OPTIMIZERS)
