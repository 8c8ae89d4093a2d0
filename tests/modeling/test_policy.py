"""The policy, which answers for its weights: what they come to, how it reads, and how it was before step 1."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.trees import CannotPack
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.sizes import NOTHING_GATHERED
from tests.builders import prepare_pairs
from tests.conftest import build_llama


@pytest.fixture
def policy(tiny_llama):
    placed = Policy.load(str(tiny_llama))
    placed.place(Accelerator(cpu=True), trained=True)
    return placed


@pytest.fixture
def batch(tmp_path, pairs_file, tokenizer):
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    return LAYOUTS["padded"].batch(range(3), [pairs[i] for i in range(3)])


def shift(policy, by=0.1):
    with torch.no_grad():
        for weights in policy.weights.trained():
            weights += by


def answer(policy, batch):
    with torch.no_grad():
        return policy.scorer(batch)


def generate(model, tokenizer, text="What is the capital of France?"):
    ids = tokenizer(text, return_tensors="pt")
    return model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)


def test_a_policy_prepared_for_the_packed_layout_generates_what_it_did_before(policy, tokenizer):
    expected = generate(policy.model, tokenizer)
    policy.read(LAYOUTS["packed"])
    with pytest.raises(CannotPack):
        generate(policy.model, tokenizer)
    with policy.reading_plainly() as model:
        assert torch.equal(generate(model, tokenizer), expected)


def test_reading_plainly_ends_with_the_layout_that_was_read_also_where_it_fails(policy, batch):
    policy.read(LAYOUTS["packed"])
    packed = policy.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), policy.reading_plainly():
        answer(policy, batch)
        raise ZeroDivisionError
    assert policy.model.config._attn_implementation == packed


def test_at_its_beginning_a_policy_answers_as_before_its_weights_moved(policy, batch):
    before = answer(policy, batch)
    policy.keep_beginning()
    shift(policy)
    moved = answer(policy, batch)
    with policy.at_beginning():
        assert torch.equal(answer(policy, batch), before)
    assert not torch.equal(moved, before)
    assert torch.equal(answer(policy, batch), moved)


def test_a_frozen_copy_stays_has_nothing_to_train_and_moves_its_share_of_the_way(policy, batch):
    copied, before = policy.frozen_copy(), {name: w.clone() for name, w in policy.weights.tensors().items()}
    shift(policy, 1.0)
    assert copied.weights.trained() == []
    assert all(torch.equal(w, before[name]) for name, w in copied.weights.tensors().items())
    copied.weights.move_towards(policy.weights, 0.25)
    for name, weights in copied.weights.tensors().items():
        torch.testing.assert_close(weights, before[name] + 0.25)
    copied.weights.set_tensors(before)
    assert all(torch.equal(w, before[name]) for name, w in copied.weights.tensors().items())
    with pytest.raises(ValueError, match="another model"):
        copied.weights.set_tensors({name: w for name, w in before.items() if "norm" not in name})


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_weights_whether_they_are_in_memory_or_not(tmp_path, tokenizer, tied):
    """Tied weights are there once: the vocabulary's 400 rows of 32 numbers."""
    folder = str(build_llama(tmp_path / "model", tokenizer, seed=0, tie_word_embeddings=tied))
    loaded, empty = Policy.load(folder).sizes(), Policy.empty(folder).sizes()
    numbers = sum(tensor.numel() for tensor in load_file(f"{folder}/model.safetensors").values())
    assert loaded.numbers == numbers
    assert (loaded.held, loaded.trained, loaded.beginning, loaded.gathered) == (
        (4 * numbers,) * 3 + (NOTHING_GATHERED,)
    )
    assert (loaded.present, empty.present) == (4 * numbers, 0)
    assert [getattr(empty, name) for name in ("numbers", "held", "trained", "beginning")] == [
        numbers,
        *[4 * numbers] * 3,
    ]


def test_what_is_written_is_restored_and_checked(policy, tokenizer, tmp_path):
    tmp_path.joinpath("saved").mkdir()
    before = {name: tensor.clone() for name, tensor in policy.weights.state().items()}
    policy.weights.write(tmp_path / "saved", tokenizer)
    policy.weights.check_written(tmp_path / "saved")
    shift(policy)
    with pytest.raises(UserError, match="was not saved as it is in memory"):
        policy.weights.check_written(tmp_path / "saved")
    policy.weights.restore(tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights.state().items())


def test_a_state_is_written_whatever_the_weights_became(policy, tokenizer, tmp_path):
    tmp_path.joinpath("saved").mkdir()
    state = {name: tensor.clone() for name, tensor in policy.weights.state().items()}
    shift(policy)
    policy.weights.write(tmp_path / "saved", tokenizer, state)
    policy.weights.restore(tmp_path / "saved")
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.weights.state().items())


def test_the_identity_is_that_of_the_weights_training_starts_from(policy, tiny_llama):
    identity = policy.identity
    shift(policy)
    assert policy.identity == identity == Policy.load(str(tiny_llama)).identity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found(policy, value):
    assert policy.weights.finite()
    with torch.no_grad():
        policy.model.model.norm.weight[3] = value
    assert not policy.weights.finite()


def test_gradients_are_clipped_to_a_norm_and_that_before_is_returned(policy):
    for weights in policy.weights.trained():
        weights.grad = torch.ones_like(weights)
    norm = sum(weights.numel() for weights in policy.weights.trained()) ** 0.5
    assert float(policy.clip(None)) == pytest.approx(norm)
    assert float(policy.clip(2.0)) == pytest.approx(norm)
    assert float(policy.clip(None)) == pytest.approx(2.0, rel=1e-4)
