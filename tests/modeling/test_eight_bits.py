"""AdamW with moments of 8 bits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from dpo_cli.modeling import eight_bits
from dpo_cli.modeling.extras import import_bitsandbytes
from dpo_cli.modeling.split import split_weights, whole_value
from dpo_cli.training.optimizer import AdamW, AdamW8bit
from dpo_cli.training.state import check_fits, optimizer_from_tensors, optimizer_to_tensors
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import build_llama


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(70, 131), torch.nn.LayerNorm(131), torch.nn.Linear(131, 9))


def go_on(trained, optimizer, steps, **dtype):
    for number in steps:
        torch.manual_seed(number)
        for place, weights in enumerate(trained):
            torch.manual_seed(100 * place)
            constant = torch.randn(weights.shape)
            torch.manual_seed(100 * place + number + 1)
            weights.grad = (constant + torch.randn(weights.shape) / 4).to(**dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_it_is_the_one_of_bitsandbytes_where_that_has_8_bits():
    import_bitsandbytes()
    import bitsandbytes

    ours, theirs = (Parameter(model()[0].weight.detach().clone()) for _ in range(2))
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=0.1)
    go_on([ours], AdamW8bit().over([ours], 1e-3, 0.1), range(20))
    go_on([theirs], reference, range(20))
    assert torch.equal(ours, theirs)


def test_norms_biases_and_small_matrices_are_those_of_adamw():
    ours, theirs = model(), model()
    go_on(list(ours.parameters()), AdamW8bit().over(list(ours.parameters()), 1e-3, 0.1), range(20))
    go_on(list(theirs.parameters()), AdamW().over(list(theirs.parameters()), 1e-3, 0.1), range(20))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close = torch.allclose(one, other, rtol=1e-6, atol=1e-7)
        assert close == (name != "0.weight"), name
        # 8 bits lose about a hundredth of a moment.
        assert (one - other).norm() < 0.03 * (one - dict(model().named_parameters())[name]).norm()


def test_in_how_many_parts_a_matrix_is_stepped_on_makes_no_difference(monkeypatch):
    whole, cut = model(), model()
    go_on(list(whole.parameters()), AdamW8bit().over(list(whole.parameters()), 1e-3, 0.1), range(5))
    monkeypatch.setattr(eight_bits, "_STRETCH", 3 * eight_bits.BLOCK)
    go_on(list(cut.parameters()), AdamW8bit().over(list(cut.parameters()), 1e-3, 0.1), range(5))
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("halves", [False, True])
def test_it_goes_on_from_what_was_saved_bit_for_bit(tmp_path, halves):
    def start():
        found = model()
        if halves:
            split_weights(found, "cpu", torch.bfloat16)
        return list(found.parameters()), AdamW8bit().over(list(found.parameters()), 1e-3, 0.1)

    dtype = {"dtype": torch.bfloat16} if halves else {}
    trained, optimizer = start()
    go_on(trained, optimizer, range(3), **dtype)
    tensors, groups = optimizer_to_tensors(optimizer.state_dict())
    save_file(tensors, tmp_path / "saved.safetensors")
    again, other = start()
    for ours, theirs in zip(again, trained, strict=True):
        ours.data.copy_(theirs.data)
        if halves:
            ours.low_bits.copy_(theirs.low_bits)
    saved = optimizer_from_tensors(load_file(tmp_path / "saved.safetensors"), groups)
    check_fits(saved["state"], other)
    other.load_state_dict(saved)
    go_on(trained, optimizer, range(3, 6), **dtype)
    go_on(again, other, range(3, 6), **dtype)
    for ours, theirs in zip(again, trained, strict=True):
        assert torch.equal(whole_value(ours), whole_value(theirs))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("exp_avg_8bit", lambda kept: kept.float()),
        ("exp_avg_scale", lambda kept: kept[1:]),
        ("exp_avg_sq_8bit", lambda kept: kept.view(-1)),
        ("exp_avg_sq_scale", lambda kept: kept.to(torch.uint8)),
    ],
)
def test_what_is_saved_of_other_weights_is_refused_before_a_kernel_reads_it(name, other):
    trained = list(model().parameters())
    optimizer = AdamW8bit().over(trained, 1e-3, 0.1)
    go_on(trained, optimizer, range(1))
    state = optimizer.state_dict()["state"]
    check_fits(state, optimizer)
    state[0][name] = other(state[0][name])
    with pytest.raises(ValueError, match=f"0.{name} matches no weights"):
        check_fits(state, optimizer)


def test_a_gradient_scaler_unscales_its_gradients_and_leaves_out_steps_that_overflowed():
    scaled, plain = model(), model()
    ours, theirs = (AdamW8bit().over(list(m.parameters()), 1e-3, 0.0) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    inputs = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    for factor in (1.0, float("inf"), 2.0):
        scaler.scale(factor * scaled(inputs).square().sum()).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if factor < float("inf"):
            (factor * plain(inputs).square().sum()).backward()
            theirs.step()
            theirs.zero_grad()
    # Half of the scale before, a power of two: gradients are the same to the bit.
    assert scaler.get_scale() == 2.0**9
    for one, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_losses_of_40_steps_are_those_of_adamw_within_a_thousandth(tmp_path, tokenizer, pairs_file):
    folder = build_llama(tmp_path / "model", tokenizer, seed=0, hidden_size=64, intermediate_size=128)
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    how = {"pairs_per_step": 1, "max_steps": 40, "learning_rate": 1e-4}
    (plain, _), (found, _) = (train_in_process(folder, pairs, **how, optimizer=one) for one in (AdamW(), AdamW8bit()))
    assert plain[-1]["loss"] < 0.6
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in plain], abs=1e-3)
    assert found != plain
