"""bfloat16 weights with the 16 bits they lack: the same numbers as float32, where every step is taken on them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.modeling.held import FLOAT32, Split
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.modeling.split import low_bits, merge, split, split_weights, whole_value
from dpo_cli.preference.reference import Frozen, Synced
from dpo_cli.settings import types
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import Adafactor, AdamW, AdamW8bit, Optimizer, RMSprop
from dpo_cli.training.state import OPTIMIZER
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import ROOT

NUMBERS = 10_000_000


def patterns():
    """Return bits of float32 of every kind, a tenth of them halfway between two bfloat16 numbers."""
    bits = torch.randint(-(2**31), 2**31, (NUMBERS,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[: NUMBERS // 10] = (bits[: NUMBERS // 10] & ~0xFFFF) | 0x8000
    bits[NUMBERS // 10 : NUMBERS // 5] &= ~0x7F800000
    limits = [0, -(2**31), 0x7F800000, 0x7F800000 - 2**31, 0x7F7FFFFF, 1, 0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000]
    bits[-len(limits) :] = torch.tensor(limits, dtype=torch.int64).to(torch.int32)
    return bits


def test_what_is_split_is_merged_bit_for_bit_ties_subnormals_and_infinities_included():
    bits = patterns()
    values = bits.view(torch.float32)
    high, low = split(values)
    nan = values.isnan()
    merged = merge(high, low)
    assert torch.equal(merged.view(torch.int32)[~nan], bits[~nan])
    assert torch.equal(high.isnan(), nan)
    assert torch.equal(merged.isnan(), nan)


def test_the_model_computes_with_the_nearest_bfloat16_number():
    values = patterns().view(torch.float32)
    values = values[values.isfinite()]
    high, _ = split(values)
    rounded = values.to(torch.bfloat16)
    away, distance = (high.double() - values).abs(), (rounded.double() - values).abs()
    # torch rounds halves to even numbers; the distance is the same.
    assert torch.equal(away, distance)


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.LayerNorm(65), torch.nn.Linear(65, 7))


OPTIMIZERS = [AdamW(), AdamW(betas=[0.8, 0.95], eps=1e-4), Adafactor(), RMSprop(momentum=0.9, centered=True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_200_steps_on_split_weights_are_those_on_float32_given_the_same_gradients(optimizer):
    whole_model, halves = small(), small()
    split_weights(halves, "cpu", torch.float32)
    ours, theirs = (optimizer.over(list(model.parameters()), 1e-4, 0.01) for model in (halves, whole_model))
    for step in range(200):
        torch.manual_seed(step)
        for p, q in zip(whole_model.parameters(), halves.parameters(), strict=True):
            p.grad = torch.randn_like(p) * 10 ** (step % 7 - 3)
            q.grad = p.grad.clone()
        for chosen in (ours, theirs):
            for group in chosen.param_groups:
                group["lr"] = 1e-4 * (1 - step / 200)
            chosen.step()
            chosen.zero_grad()
    for p, q in zip(whole_model.parameters(), halves.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        assert torch.equal(whole_value(q), p)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, AdamW8bit()], ids=str)
def test_what_stays_on_the_host_is_stepped_on_as_if_it_did_not(optimizer):
    def go_on(trained, chosen, steps):
        for step in steps:
            torch.manual_seed(step)
            for p in trained:
                p.grad = torch.randn(p.shape).to(p.grad_dtype)
            chosen.step()

    near, far, again = ([*small().parameters()] for _ in range(3))
    for trained, on_host in ((near, False), (far, True), (again, True)):
        holder = torch.nn.ParameterList(trained)
        split_weights(holder, "cpu", getattr(torch, optimizer.gradients), low_on_host=on_host)
    ours, theirs, other = (optimizer.over(t, 1e-3, 0.1, on_host=t is not near) for t in (near, far, again))
    go_on(near, ours, range(6))
    go_on(far, theirs, range(3))
    kept = {name: value.data_ptr() for name, value in theirs.state[far[0]].items() if value.ndim}
    for p, q in zip(again, far, strict=True):
        p.data.copy_(q.data)
        p.low_bits.copy_(q.low_bits)
    other.load_state_dict(theirs.state_dict())
    go_on(far, theirs, range(3, 6))
    go_on(again, other, range(3, 6))
    for p, q, r in zip(near, far, again, strict=True):
        assert torch.equal(whole_value(p), whole_value(q))
        assert torch.equal(whole_value(p), whole_value(r))
    # It is written over where it is.
    assert kept == {name: value.data_ptr() for name, value in theirs.state[far[0]].items() if value.ndim}


TABLE = ROOT / "docs" / "weights.md"
ROW = re.compile(
    r"^\| `(float32|split)`[^|]*\| `(\w+)` \|( `optimizer` )?[^|]*\| ([\d.]+) [^|]*\| ([\d.]+) [^|]*\|", re.M
)
ROWS = [match.groups() for match in ROW.finditer(TABLE.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("weights", "name", "offload", "device", "host"), ROWS, ids=str)
def test_a_parameter_takes_the_bytes_that_the_table_says(weights, name, offload, device, host):
    optimizer = TrainingSettings(optimizer=name).optimizer
    layer = torch.nn.Linear(4096, 1024, bias=False)
    held = Split(gradients=optimizer.gradients, low_on_host=bool(offload)) if weights == "split" else FLOAT32
    if weights == "split":
        held.settle(layer, "cpu")
    chosen = optimizer.over([layer.weight], 1e-3, 0.0, on_host=bool(offload))
    layer.weight.grad = torch.ones_like(layer.weight, dtype=layer.weight.grad_dtype)
    chosen.step()
    state = sum(kept.nbytes for kept in chosen.state[layer.weight].values())
    low = layer.weight.low_bits.nbytes if weights == "split" else 0
    on_device, on_host = layer.weight.nbytes + layer.weight.grad.nbytes, state + low
    if not offload:
        on_device, on_host = on_device + on_host, 0
    numbers = layer.weight.numel()
    assert on_device / numbers == pytest.approx(float(device), abs=0.05)
    assert on_host / numbers == pytest.approx(float(host), abs=0.05)
    estimated = held.bytes_of(layer) + held.gradient_bytes([layer.weight])
    assert estimated + (0 if offload else optimizer.state_bytes([layer.weight])) == pytest.approx(on_device, abs=8)


def test_the_table_has_every_optimizer_and_both_ways_to_hold_weights():
    assert {(weights, name) for weights, name, *_ in ROWS} >= {("split", name) for name in types(Optimizer)}
    assert len(ROWS) == 9
    assert {weights for weights, *_ in ROWS} == {"float32", "split"}


def test_gradients_of_several_passes_are_added_up_in_float32():
    layer = torch.nn.Linear(8, 4, bias=False)
    split_weights(layer, "cpu", torch.float32)
    inputs = torch.randn(9, 3, 8).to(torch.bfloat16)
    for rows in inputs:
        layer(rows).sum().backward()
    parts = [rows.sum(0).to(torch.bfloat16).float() for rows in inputs]
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, sum(parts).expand(4, 8), rtol=1e-6, atol=1e-6)


class OnCopies(torch.optim.AdamW):
    """The same by other means: torch's AdamW on float32 copies of all weights, rounded into them after each step."""

    def __init__(self, trained, learning_rate):
        self.trained, self.copies = trained, [Parameter(whole_value(p).clone()) for p in trained]
        super().__init__(self.copies, lr=learning_rate, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        for p, copied in zip(self.trained, self.copies, strict=True):
            copied.grad = p.grad.float()
        super().step()
        for p, copied in zip(self.trained, self.copies, strict=True):
            upper = (copied.view(torch.int32).long() + 0x8000) >> 16
            p.copy_(upper.to(torch.int16).view(torch.bfloat16))

    def zero_grad(self, set_to_none=True):
        for p in self.trained:
            p.grad = None


class Copying(AdamW):
    def over(self, trained, learning_rate, weight_decay, **others):
        COPIES.append(OnCopies(trained, learning_rate))
        return COPIES[-1]


COPIES = []


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer):
    return prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")


@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "padded"},
        {"layout": "packed", "micro_batch_tokens": 300},
        {"layout": "packed", "checkpointing": True, "reference": Synced(every_steps=2, alpha=0.5)},
        {"layout": "padded", "micro_batch_tokens": 300, "reference": Frozen(), "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_a_run_is_that_of_float32_weights_which_are_rounded_wherever_they_are_used(tiny_llama, pairs, settings):
    how = {"max_steps": 5, "ways": {"held": Split()}, **settings}
    metrics, weights = train_in_process(tiny_llama, pairs, **how)
    expected, _ = train_in_process(tiny_llama, pairs, **how, optimizer=Copying())
    assert metrics == expected
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for tensor, copied in zip(weights.values(), COPIES[-1].copies, strict=True):
        assert torch.equal(tensor, copied)


def kept_by(learner):
    """Return a copy of all that a step changes, by what it is."""
    return {
        "weights": [p.detach().clone() for p in learner.policy.weights.trained()],
        "low bits": [p.low_bits.clone() for p in learner.policy.weights.trained()],
        "moments": [tensor.clone() for tensor in learner.state().tensors[OPTIMIZER].values()],
    }


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [AdamW(), AdamW8bit(), Adafactor()], ids=str)
def test_a_skipped_step_touches_neither_weights_nor_low_bits_nor_moments(
    tiny_llama, pairs, monkeypatch, optimizer, what
):
    """The third of five steps is not finite."""
    forward, finish, steps = Scorer.forward, Learner._finish, []

    def spoilt(scorer, batch, **how):
        found = forward(scorer, batch, **how)
        if found.requires_grad and len(steps) == 2:
            if what == "loss":
                return found * float("nan")
            found.register_hook(lambda slope: slope * float("nan"))
        return found

    def seen(learner, *arguments):
        before = kept_by(learner)
        result = finish(learner, *arguments)
        steps.append((result.broken, before, kept_by(learner)))
        return result

    monkeypatch.setattr(Scorer, "forward", spoilt)
    monkeypatch.setattr(Learner, "_finish", seen)
    held = Split(gradients=optimizer.gradients)
    train_in_process(tiny_llama, pairs, max_steps=5, max_skipped=1, optimizer=optimizer, ways={"held": held})
    assert [broken and broken.what for broken, *_ in steps] == [None, None, what, None, None]
    for broken, before, after in steps:
        for name, tensors in after.items():
            same = len(before[name]) == len(tensors) and all(map(torch.equal, before[name], tensors))
            # At this learning rate all of them change in a step that is taken.
            assert same == bool(broken), name


def test_what_is_written_is_float32_and_comes_back_bit_for_bit(tiny_llama, tokenizer, tmp_path):
    policy = Policy.load(str(tiny_llama), held=Split())
    with torch.no_grad():
        for p in policy.weights.trained():
            p.low_bits += torch.arange(p.numel(), dtype=torch.int16).view(p.shape) % 1000
    (tmp_path / "saved").mkdir()
    policy.weights.write(tmp_path / "saved", tokenizer)
    policy.weights.check_written(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    state = {name: whole_value(tensor) for name, tensor in policy.weights.state().items()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == dict.fromkeys(state, torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    other = Policy.load(str(tiny_llama), held=Split())
    other.weights.restore(tmp_path / "saved")
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor)
        assert torch.equal(plain[name], tensor)
        assert torch.equal(whole_value(other.weights.state()[name]), tensor)
    as_float32 = Policy.load(str(tmp_path / "saved"))
    assert other.weights.fingerprints == as_float32.weights.fingerprints
    assert other.identity != as_float32.identity


def test_a_copy_that_does_not_train_has_no_low_bits(tiny_llama):
    policy = Policy.load(str(tiny_llama), held=Split())
    assert all(low_bits(p) is not None for p in policy.model.parameters())
    assert all(low_bits(p) is None for p in policy.frozen_copy().model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in policy.frozen_copy().model.parameters())
