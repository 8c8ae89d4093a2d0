"""The learning rate over the steps, and what is decayed."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_cli.training.optimizer import adamw, schedule


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


def test_weight_decay_reaches_matrices_and_leaves_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = adamw(model, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
