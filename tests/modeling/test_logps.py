"""Log-probabilities in chunks against a plain log-softmax over everything."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.modeling.logps import Head, SequenceLogps, _plus_product, chunk_bytes_on, token_logps
from dpo_cli.modeling.responses import Predictions, Responses

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


def at(positions):
    """Say that the hidden states at these positions predict the targets."""
    return Predictions.of(positions.numpy())


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
    found = token_logps(hidden, at(positions), targets, head, chunk_rows * ROW_BYTES)
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
        return token_logps(hidden, at(positions), targets, Head(weight, bias, 1.5, 4.0), 4 * ROW_BYTES)

    assert torch.autograd.gradcheck(call, (hidden, head.weight, head.bias))


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    hidden, positions, targets, head = make()
    frozen = Head(head.weight.detach())
    token_logps(hidden, at(positions), targets, frozen).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[positions].abs().sum() > 0


def test_statistics_are_float32_where_the_hidden_states_are_bfloat16():
    hidden, positions, targets, head = make(torch.bfloat16)
    found = token_logps(hidden, at(positions), targets, head)
    assert found.dtype == torch.float32
    exact = plain(hidden.double(), positions, targets, Head(head.weight.double()))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.1)


class Casts(TorchDispatchMode):
    """Counts how often a tensor is written in another type."""

    def __init__(self, watched):
        super().__init__()
        self.watched, self.count = watched, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.watched.data_ptr():
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk_rows", [1, 100])
def test_the_matrix_is_cast_once_for_all_chunks_forward_and_backward(chunk_rows):
    hidden, positions, targets, head = make(torch.float32)
    with Casts(head.weight) as casts:
        with torch.autocast("cpu", torch.bfloat16):
            found = token_logps(hidden, at(positions), targets, head, chunk_rows * ROW_BYTES)
        assert casts.count == 1
        found.sum().backward(retain_graph=True)
        assert casts.count == 1
        # What waits for a second backward pass would take memory through the first.
        found.sum().backward()
    assert casts.count == 2


def test_a_matrix_in_the_precision_of_the_products_is_not_cast():
    hidden, positions, targets, head = make(torch.bfloat16)
    with Casts(head.weight) as casts:
        token_logps(hidden, at(positions), targets, head, ROW_BYTES).sum().backward()
    assert casts.count == 0


def test_the_matrix_in_lower_precision_is_gone_when_the_layers_go_backward():
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.extend(isinstance(copy(), torch.Tensor) for copy in copies)
            return grad

    hidden, positions, targets, head = make(torch.float32)
    alive, copies, cast = [], [], torch.Tensor.to

    def watched(self, *args, **kwargs):
        found = cast(self, *args, **kwargs)
        if self is head.weight:
            copies.append(weakref.ref(found))
        return found

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.Tensor, "to", watched)
        found = token_logps(Layer.apply(hidden), at(positions), targets, head, ROW_BYTES)
    assert len(copies) == 1
    assert copies[0]() is not None
    found.sum().backward()
    assert alive == [False]


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 weights", "bfloat16 weights"])
def test_a_gradient_of_many_chunks_is_as_exact_as_that_of_one(autocast):
    generator = torch.Generator().manual_seed(0)
    rows, width, words = 1024, 64, 512
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    weight = (torch.randn(words, width, generator=generator) / 8).bfloat16()
    targets = torch.randint(words, (rows,), generator=generator)
    upstream = torch.rand(rows, generator=generator)

    def gradient(dtype, chunks, asked=None):
        head = weight.to(dtype, copy=True).requires_grad_()
        head.grad_dtype = asked or dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            found = token_logps(
                hidden.to(dtype), at(torch.arange(rows)), targets, Head(head), rows // chunks * 4 * words
            )
        found.backward(upstream.to(found.dtype))
        return head.grad

    exact = gradient(torch.float64, 1)
    held = torch.float32 if autocast else torch.bfloat16

    def error(chunks):
        found = gradient(held, chunks, torch.float32)
        assert found.dtype == torch.float32
        return float((found.double() - exact).norm() / exact.norm())

    assert error(64) <= 1.1 * error(1)
    assert 1e-4 < error(1) < 5e-3
    # Not the accumulation but the parameter decides what type its gradient is rounded to, and that once.
    assert gradient(held, 64).dtype == held
    torch.testing.assert_close(gradient(held, 64), gradient(held, 64, torch.float32).to(held), rtol=0, atol=0)


def test_what_accumulates_the_gradient_on_a_gpu_is_accepted_there():
    """No kernel runs: types and shapes alone, as PyTorch's own description of the operators checks them."""
    with FakeTensorMode():
        left, right = (torch.empty(4, 4, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        total = _plus_product(None, left.T, right, torch.float32)
        assert total.dtype == torch.float32
        assert total.device.type == "cuda"


def test_chunks_are_larger_where_memory_is_what_takes_the_time():
    assert chunk_bytes_on("cuda") > chunk_bytes_on("cpu") == chunk_bytes_on("mps")


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
    token_logps(hidden, at(positions), targets, head, 4 * ROW_BYTES).sum().backward()
    assert largest == 4


def test_extreme_logits_stay_finite():
    hidden, positions, targets, head = make(torch.float32, spread=200.0)
    found = token_logps(hidden, at(positions), targets, head)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(hidden.grad).all()


def test_sums_are_taken_over_each_response_alone():
    tokens = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    logps = SequenceLogps(tokens, Responses.of((1, 2, 2, 1)))
    assert logps.chosen.tolist() == [1.0, 6.0]
    assert logps.rejected.tolist() == [24.0, 32.0]
    assert logps.chosen_lengths.tolist() == [1, 2]
    assert logps.rejected_lengths.tolist() == [2, 1]
