"""The learning rate over the steps, and what is decayed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.config.schema import Config, TrainingSettings
from dpo_cli.settings import members, types
from dpo_cli.training.optimizer import SCHEDULES, Adafactor, AdamW, AdamW8bit, Optimizer, RMSprop, schedule
from dpo_cli.training.state import optimizer_from_tensors, optimizer_to_tensors

CHANGED = [
    AdamW(betas=[0.8, 0.95], eps=1e-3),
    Adafactor(beta2_decay=-0.5, eps1=1e-4, eps2=0.1, d=3.0),
    RMSprop(alpha=0.5, eps=1e-3, momentum=0.9, centered=True),
    RMSprop(momentum=0.5),
    AdamW8bit(betas=[0.8, 0.95], eps=1e-3),
]
"""Optimizers with other settings than they have by default."""
ALL = [*(kind() for kind in members(Optimizer)), *CHANGED]
TORCH = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "rmsprop": torch.optim.RMSprop}


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


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_rate_is_zero_or_above_the_highest(kind):
    for num_steps in (1, 2, 7):
        for ratio in (0.0, 0.1, 0.9):
            assert all(0 < rate <= 2.0 for rate in rates(kind, ratio, num_steps))


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_weight_decay_reaches_matrices_and_leaves_biases_and_norms(optimizer):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(optimizer.over(list(model.parameters()), 0.1, 0.5), model, lambda p: torch.zeros_like(p))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == {"0.weight"}
    if optimizer.type == "adamw":
        torch.testing.assert_close(model[0].weight.detach(), before["0.weight"] * (1 - 0.1 * 0.5))


def step(chosen, model, gradient):
    for p in model.parameters():
        p.grad = gradient(p)
    chosen.step()


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_what_an_optimizer_keeps_is_what_the_estimate_says(optimizer):
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.LayerNorm(50))
    chosen = optimizer.over(list(model.parameters()), 0.1, 0.0)
    step(chosen, model, torch.ones_like)
    kept = sum(v.nbytes for state in chosen.state.values() for v in state.values() if v.ndim > 0)
    assert optimizer.state_bytes(list(model.parameters())) == kept


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(optimizer, tmp_path):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 5)
        return model, optimizer.over(list(model.parameters()), 0.1, 0.01)

    def go_on(model, chosen, steps):
        for number in steps:
            torch.manual_seed(number)
            step(chosen, model, torch.randn_like)

    whole, chosen = start()
    go_on(whole, chosen, range(5))
    first, chosen = start()
    go_on(first, chosen, range(2))
    tensors, groups = optimizer_to_tensors(chosen.state_dict())
    save_file(tensors, tmp_path / "optimizer.safetensors")
    second, chosen = start()
    second.load_state_dict(first.state_dict())
    saved = load_file(tmp_path / "optimizer.safetensors")
    chosen.load_state_dict(optimizer_from_tensors(saved, json.loads(json.dumps(groups))))
    go_on(second, chosen, range(2, 5))
    assert torch.equal(second.weight, whole.weight)


def trained(chosen, model, num_steps=6):
    for number in range(num_steps):
        torch.manual_seed(number)
        step(chosen, model, torch.randn_like)
    return [p.detach().clone() for p in model.parameters()]


def models(number):
    found = []
    for _ in range(number):
        torch.manual_seed(0)
        found.append(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)))
    return found


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (AdamW(), {}),
        (Adafactor(), {}),
        (RMSprop(), {}),
        (AdamW(betas=[0.8, 0.95]), {"betas": (0.8, 0.95)}),
        (AdamW(eps=1e-2), {"eps": 1e-2}),
        (Adafactor(beta2_decay=-0.5), {"beta2_decay": -0.5}),
        (Adafactor(eps1=1e-2, eps2=0.5), {"eps": (1e-2, 0.5)}),
        (Adafactor(d=4.0), {"d": 4.0}),
        (RMSprop(alpha=0.5), {"alpha": 0.5}),
        (RMSprop(eps=1e-2), {"eps": 1e-2}),
        (RMSprop(momentum=0.9), {"momentum": 0.9}),
        (RMSprop(centered=True), {"centered": True}),
    ],
    ids=str,
)
def test_settings_are_those_of_torch_s_optimizer_and_change_where_it_goes(optimizer, settings):
    ours, theirs, by_default = models(3)
    reference = TORCH[optimizer.type](theirs.parameters(), lr=0.1, weight_decay=0.0, **settings)
    found = trained(optimizer.over(list(ours.parameters()), 0.1, 0.0), ours)
    for one, other in zip(found, trained(reference, theirs), strict=True):
        torch.testing.assert_close(one, other)
    plain = TORCH[optimizer.type](by_default.parameters(), lr=0.1, weight_decay=0.0)
    same = [torch.allclose(a, b, rtol=1e-4) for a, b in zip(found, trained(plain, by_default), strict=True)]
    assert all(same) if not settings else not all(same)


@pytest.mark.parametrize("kind", types(Optimizer))
def test_every_optimizer_can_be_asked_for_by_its_name_or_as_a_group(kind):
    asked = TrainingSettings(optimizer=kind).optimizer
    assert asked == TrainingSettings(optimizer={"type": kind}).optimizer
    assert asked.type == kind
    assert type(asked) in members(Optimizer)


def test_a_group_without_a_type_is_adamw_s():
    assert TrainingSettings(optimizer={"betas": [0.9, 0.95], "eps": 1e-6}).optimizer == AdamW(
        betas=[0.9, 0.95], eps=1e-6
    )


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_an_optimizer_is_the_same_in_the_configuration_that_a_run_writes(optimizer):
    written = Config(model="m", training={"optimizer": optimizer.model_dump()}).model_dump(mode="json")
    assert Config(**json.loads(json.dumps(written))).training.optimizer == optimizer
