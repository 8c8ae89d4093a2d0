"""A policy with an adapter: what trains, what stays, and how it answers as before step 1."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.attention import pieces as attention
from dpo_cli.modeling.held import Bfloat16
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import prove
from dpo_cli.modeling.scorer import Scorer
from tests.builders import Louder, prepare_pairs, stirred

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"dora": True, "rslora": True}}


def adapted(model, *, seed=0, held=None, **settings):
    lora = Lora(**{"rank": 4, "alpha": 8, **settings})
    return Policy.load(str(model), trained=Adapted(lora, seed), **({"held": held} if held else {}))


@pytest.fixture
def batch(tmp_path, pairs_file, tokenizer):
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    return LAYOUTS["padded"].batch(range(3), [pairs[i] for i in range(3)])


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Write the adapter of a policy into a folder, after its weights were moved."""

    def save(policy, name="start"):
        folder = tmp_path / name
        folder.mkdir()
        stirred(policy)
        policy.weights.write(folder, tokenizer)
        return folder

    return save


def placed(policy):
    policy.place(Accelerator(cpu=True), trained=True)
    return policy


def answer(policy, batch, dtype=None):
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        return policy.scorer(batch)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_its_beginning_a_fresh_adapter_answers_as_its_base_to_the_bit(tiny_llama, batch, kind, dtype):
    held = Bfloat16() if dtype else None
    base = answer(placed(Policy.load(str(tiny_llama), **({"held": held} if held else {}))), batch, dtype)
    policy = placed(adapted(tiny_llama, held=held, **KINDS[kind]))
    assert torch.equal(answer(policy, batch, dtype), base)
    policy.keep_beginning()
    stirred(policy)
    moved = answer(policy, batch, dtype)
    assert not torch.equal(moved, base)
    with policy.at_beginning():
        assert torch.equal(answer(policy, batch, dtype), base)
    assert torch.equal(answer(policy, batch, dtype), moved)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_its_beginning_an_adapter_that_was_gone_on_from_answers_as_it_did(tiny_llama, batch, saved, kind, dtype):
    base, first = answer(placed(Policy.load(str(tiny_llama))), batch, dtype), adapted(tiny_llama, **KINDS[kind])
    start = saved(first)
    expected = answer(placed(first), batch, dtype)
    policy = placed(adapted(tiny_llama, seed=7, start=str(start), **KINDS[kind]))
    assert torch.equal(answer(policy, batch, dtype), expected)
    assert not torch.allclose(expected, base, atol=0.1)
    policy.keep_beginning()
    stirred(policy)
    moved = answer(policy, batch, dtype)
    with policy.at_beginning():
        assert torch.equal(answer(policy, batch, dtype), expected)
    assert torch.equal(answer(policy, batch, dtype), moved)
    assert not torch.equal(moved, expected)


def test_the_adapter_is_back_also_where_answering_as_before_fails(tiny_llama, batch):
    policy = placed(adapted(tiny_llama))
    policy.keep_beginning()
    stirred(policy)
    moved = answer(policy, batch)
    with pytest.raises(ZeroDivisionError), policy.at_beginning():
        raise ZeroDivisionError
    assert torch.equal(answer(policy, batch), moved)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_acts_in_training_passes_alone(tiny_llama, batch, kind):
    policy = placed(adapted(tiny_llama, dropout=0.5, **KINDS[kind]))
    policy.keep_beginning()
    stirred(policy)
    plain = answer(policy, batch)
    with policy.adding_up(last=True):
        dropped = answer(policy, batch)
        with policy.at_beginning():
            beginning = answer(policy, batch)
    assert not torch.allclose(dropped, plain, atol=1e-3)
    assert torch.equal(answer(policy, batch), plain)
    assert torch.equal(beginning, answer(placed(Policy.load(str(tiny_llama))), batch))


def saved_bytes(model, batch, targets):
    """Return what one pass keeps for the backward pass, the weights aside."""
    policy, kept = placed(adapted(model, held=Bfloat16(), rank=1, targets=targets)), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {weights.untyped_storage().data_ptr() for weights in policy.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        policy.scorer(batch)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)


def test_layers_that_read_the_same_keep_it_once_for_the_backward_pass(tiny_llama, batch):
    """Queries, keys and values have one input of 32 numbers a token in each of two layers, of two bytes each."""
    inputs = 2 * batch.input_ids.numel() * 32 * 2
    few, many = (saved_bytes(tiny_llama, batch, targets) for targets in (["q_proj"], ["q_proj", "k_proj", "v_proj"]))
    assert few < many < few + inputs / 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [(lambda states: states * 1.01, "log-probabilities differ"), (Louder.apply, "gradient's norm differs")],
)
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["q_proj", "v_proj"], r".*layers\.0\.mlp\.gate_proj"])
def test_the_proof_of_a_layout_finds_faults_beside_a_fresh_adapter(
    tiny_llama, tmp_path, pairs_file, tokenizer, monkeypatch, targets, fault, said
):
    """Before step 1 no A has a gradient, and those of B come through what the adapter is beside."""
    prepared = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    pairs, attend = [prepared[at] for at in range(2)], attention._attend
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(attention, "_attend", lambda *how: fault(attend(*how)))
        model = adapted(tiny_llama, targets=targets).model
        proof = prove(Scorer(model), LAYOUTS["packed"], pairs, PRECISIONS["float32"])
        assert (said in proof.fails(PRECISIONS["float32"])) is planted, proof
        assert planted or not proof.fails(PRECISIONS["float32"])
