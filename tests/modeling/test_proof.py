"""The proof in bfloat16: exactness in float32 whatever weights are held in, and rounding that is measured."""

from __future__ import annotations

import dataclasses
import random
import weakref

import pytest
import torch
from check_proof import FAULTS, proved
from tiny_models import build, example_pairs

from dpo_cli.modeling.attention import pieces as attention
from dpo_cli.modeling.layouts import PACKED, PADDED
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import NOISE_FACTOR, Proof, Rounding, prove
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.modeling.upcast import in_float32
from tests.builders import Louder

PAIRS = example_pairs()
BFLOAT16 = PRECISIONS["bfloat16"]
WINDOWED = "mistral with a window"


def held(kind, dtype):
    return build(kind).to(dtype)


def answers(model, ask):
    """Return the log-probabilities of some pairs, and the gradients of all weights."""
    logps = ask(PADDED.batch(range(2), PAIRS[:2]))
    model.zero_grad()
    (logps.square().sum()).backward()
    return logps.detach(), {name: weights.grad for name, weights in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "mamba"])
def test_weights_in_bfloat16_compute_in_float32_as_a_whole_copy_would(kind):
    model = held(kind, torch.bfloat16)
    copy = held(kind, torch.bfloat16).float()
    owned = {name: id(weights) for name, weights in model.named_parameters()}
    for ask, expect in ((Scorer(model), Scorer(copy)), (Scorer(model).own_logps, Scorer(copy).own_logps)):
        with in_float32(model):
            logps, gradients = answers(model, ask)
        expected, exact = answers(copy, expect)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            # Rounded once, to what the weights are held in.
            assert (gradient - exact[name]).norm() <= 5e-3 * exact[name].norm() + 1e-4, name
    assert {name: id(weights) for name, weights in model.named_parameters()} == owned
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}


def test_no_more_than_a_layer_and_the_vocabulary_matrix_is_in_float32_at_once(monkeypatch):
    model = build("llama", num_hidden_layers=6).bfloat16()
    sizes = {weights.shape for weights in model.parameters()}
    alive, most, cast = [], [0], torch.Tensor.float

    def watched(self):
        wide = cast(self)
        if self.dtype == torch.bfloat16 and self.shape in sizes:
            alive.append((weakref.ref(wide), wide.nbytes))
            most[0] = max(most[0], sum(size for of, size in alive if of() is not None))
        return wide

    monkeypatch.setattr(torch.Tensor, "float", watched)
    with in_float32(model):
        answers(model, Scorer(model).own_logps)
    layer = 4 * sum(weights.numel() for weights in model.model.layers[0].parameters())
    vocabulary = 4 * model.lm_head.weight.numel()
    assert layer <= most[0] <= 1.1 * (layer + 2 * vocabulary)


def test_a_model_that_fails_meanwhile_has_its_own_weights_again(monkeypatch):
    model = held("llama", torch.bfloat16)

    def fails(*arguments, **options):
        raise RuntimeError("no")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fails)
    with pytest.raises(RuntimeError), in_float32(model):
        Scorer(model)(PADDED.batch([0], PAIRS[:1]))
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "dtype", "seeds"),
    [
        ("llama", torch.float32, 5),
        ("llama", torch.bfloat16, 5),
        pytest.param("llama", torch.float32, 50, marks=pytest.mark.slow),
        pytest.param("llama", torch.bfloat16, 50, marks=pytest.mark.slow),
        pytest.param(WINDOWED, torch.bfloat16, 50, marks=pytest.mark.slow),
        pytest.param("mixtral", torch.bfloat16, 50, marks=pytest.mark.slow),
    ],
)
def test_no_pairs_are_a_false_alarm_in_bfloat16(kind, dtype, seeds):
    model = held(kind, dtype)
    for seed in range(seeds):
        pairs = random.Random(seed).sample(PAIRS, 2)
        proof = proved(model, pairs, "none")
        assert not proof.fails(BFLOAT16), (seed, proof)
        assert proof.rounding is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
def test_every_planted_fault_is_found_in_bfloat16(fault, dtype):
    model = held(WINDOWED, dtype)
    for seed in range(2):
        proof = proved(model, random.Random(seed).sample(PAIRS, 2), fault, trained=False)
        assert "log-probabilities differ" in proof.fails(BFLOAT16), (seed, proof)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(lambda states: 1.3 * states, "in bfloat16 log-probabilities differ"), (Louder.apply, "in bfloat16 the gradient")],
    ids=["forward", "backward"],
)
def test_a_fault_of_bfloat16_alone_is_found_beside_rounding(fault, said, monkeypatch):
    attend = attention._attend

    def lower(query, *arguments):
        found = attend(query, *arguments)
        return fault(found) if found.dtype == torch.bfloat16 else found

    monkeypatch.setattr(attention, "_attend", lower)
    assert said in prove(Scorer(build("llama")), PACKED, PAIRS[:2], BFLOAT16).fails(BFLOAT16)


def test_a_process_makes_the_passes_of_one_in_which_the_proof_takes_another_turn(monkeypatch):
    """All is well in the first one. In the other there is no gradient at first, or answers are not exact or finite."""
    passes, score = [], Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda self, *batch, **how: passes.append(1) or score(self, *batch, **how))

    def proved_with(*others):
        passes.clear()
        answers = iter(others)
        proof = prove(
            Scorer(build("llama")), PACKED, PAIRS[:2], BFLOAT16, anywhere=lambda holds: next(answers) or holds
        )
        return proof.fails(BFLOAT16), len(passes), list(answers)

    failure, usual, left = proved_with(False, False, False)
    assert (failure, left) == ("", [])
    assert proved_with(True, False, False) == ("", usual + 2, [])
    _, when_inexact, left = proved_with(False, False, True)
    assert (when_inexact, left) == (usual - 1, [])
    failure, when_not_finite, left = proved_with(False, True, None)
    assert failure
    assert (when_not_finite, left) == (usual - 2, [None])


def test_what_rounding_explains_decides_and_a_noise_that_is_not_a_number_fails():
    proof = Proof(1e-6, 0.0, Rounding(0.1, 0.05, 0.0, 0.0))
    assert not proof.fails(BFLOAT16)
    for rounding in (Rounding(0.1, 0.1 / NOISE_FACTOR - 1e-3, 0, 0), Rounding(0.1, float("nan"), 0, 0)):
        assert "rounding explains" in dataclasses.replace(proof, rounding=rounding).fails(BFLOAT16)
    lines = list(proof.lines(PACKED, BFLOAT16, trained=False))
    assert "in float32" in lines[0]
    assert "0.05" in lines[1]
