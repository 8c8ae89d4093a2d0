"""Log-probabilities in chunks against a plain log-softmax over everything."""

from __future__ import annotations

import pytest
import torch

from dpo_cli.modeling.logps import Head, SequenceLogps, token_logps

M, N, H, V = 23, 13, 7, 29
ROW_BYTES = 4 * V


def make(dtype=torch.float64, *, bias=False, scale=1.0, softcap=None, spread=1.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    hidden, weight = draw(M, H), draw(V, H)
    positions = torch.randperm(M, generator=generator)[:N]
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, positions, targets, Head(weight, draw(V) if bias else None, scale, softcap)


def plain(hidden, positions, targets, head):
    """The definition: log_softmax of all logits on the vocabulary axis, gathered at the targets."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)[positions, targets]


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 13, 100])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"scale": 0.25},
        {"softcap": 3.0, "spread": 3.0},
        {"bias": True, "scale": 2.0, "softcap": 5.0},
    ],
    ids=str,
)
def test_values_and_gradients_are_the_definitions_at_every_chunk_size(settings, chunk_rows):
    hidden, positions, targets, head = make(**settings)
    inputs = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    found = token_logps(hidden, positions, targets, head, chunk_rows * ROW_BYTES)
    expected = plain(hidden, positions, targets, head)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_gradient_agrees_with_finite_differences():
    hidden, positions, targets, head = make(bias=True)
    hidden, head = (
        hidden.detach()[:4, :3].requires_grad_(),
        Head(head.weight.detach()[:, :3].requires_grad_(), head.bias),
    )
    positions = torch.tensor([3, 0, 2])
    targets = targets[:3]

    def call(hidden, weight, bias):
        return token_logps(hidden, positions, targets, Head(weight, bias, 1.5, 4.0), 4 * ROW_BYTES)

    assert torch.autograd.gradcheck(call, (hidden, head.weight, head.bias))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden, positions, targets, head = make()
    frozen = Head(head.weight.detach())
    token_logps(hidden, positions, targets, frozen).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[positions].abs().sum() > 0


def test_statistics_are_float32_where_the_hidden_states_are_bfloat16():
    hidden, positions, targets, head = make(torch.bfloat16)
    found = token_logps(hidden, positions, targets, head)
    assert found.dtype == torch.float32
    exact = plain(hidden.double(), positions, targets, Head(head.weight.double()))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.1)


def test_full_logits_never_exist(monkeypatch):
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(self, other):
        nonlocal largest
        product = matmul(self, other)
        if product.shape[-1] == V:
            largest = max(largest, product.shape[0])
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    hidden, positions, targets, head = make()
    token_logps(hidden, positions, targets, head, 4 * ROW_BYTES).sum().backward()
    assert largest == 4


def test_extreme_logits_stay_finite():
    hidden, positions, targets, head = make(torch.float32, spread=200.0)
    found = token_logps(hidden, positions, targets, head)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(hidden.grad).all()


def test_sums_are_taken_over_each_response_alone():
    tokens = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    logps = SequenceLogps(tokens, (1, 2, 2, 1))
    assert logps.chosen.tolist() == [1.0, 6.0]
    assert logps.rejected.tolist() == [24.0, 32.0]
    assert logps.chosen_lengths.tolist() == [1, 2]
    assert logps.rejected_lengths.tolist() == [2, 1]
