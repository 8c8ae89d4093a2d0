"""An adapter beside one layer, against its equations written out in numpy: outputs and every gradient, in float64.

For inputs x `[N, in]`, weights W `[out, in]`, bias b, A `[r, in]`, B `[out, r]`, and G, the gradient of the outputs y:

    LoRA   y = x Wᵀ + b + s · x Aᵀ Bᵀ                     dA = s · Bᵀ Gᵀ x     dB = s · Gᵀ x Aᵀ     dx = G (W + s B A)
    DoRA   V = W + s B A, n = the norms of its rows,
           y = m/n · x Vᵀ + b                             as above with m/n · G in place of G, and dm = Σ G · x Vᵀ / n

with s = α/r, or α/√r for rsLoRA. n is a constant in DoRA's gradient (Liu et al. 2024, section 4.3).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_models import build

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora

RANK, ALPHA = 3, 7.0
KINDS = {
    "lora": (Lora(rank=RANK, alpha=ALPHA), ALPHA / RANK),
    "rslora": (Lora(rank=RANK, alpha=ALPHA, rslora=True), ALPHA / math.sqrt(RANK)),
    "dora": (Lora(rank=RANK, alpha=ALPHA, dora=True), ALPHA / RANK),
    "dora and rslora": (Lora(rank=RANK, alpha=ALPHA, dora=True, rslora=True), ALPHA / math.sqrt(RANK)),
}
"""Settings and s."""
LAYERS = {
    "linear with a bias": ("llama", "model.layers.1.self_attn.k_proj"),
    "linear without": ("llama", "model.layers.0.mlp.down_proj"),
    "Conv1D, to more features": ("gpt2", "transformer.h.0.attn.c_attn"),
    "Conv1D, square": ("gpt2", "transformer.h.1.attn.c_proj"),
}


class Numbers(NamedTuple):
    """What a layer computes with, as numpy has it; m is None without DoRA."""

    x: Any
    g: Any
    w: Any
    b: Any
    a_: Any
    b_: Any
    m: Any


class Answers(NamedTuple):
    """What a layer answers, and the gradient of everything that has one."""

    y: Any
    dx: Any
    da: Any
    db: Any
    dm: Any


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=LAYERS)
def layer(request, kind):
    """A layer of a model with an adapter that has moved from its beginning."""
    name, path = LAYERS[request.param]
    model = build(name)
    Adapted(kind[0], seed=0).choose(model)
    layer = model.get_submodule(path).double()
    generator = torch.Generator().manual_seed(3)
    for weights in layer.parameters():
        if weights.requires_grad:
            weights.data += 0.3 * torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    return layer


def asked(layer):
    """Ask the layer; return what it computed with and its answers."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, layer.in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, layer.out_features, generator=generator, dtype=torch.float64)
    y = layer(x)
    y.backward(g)
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weights = base.weight if isinstance(base, torch.nn.Linear) else base.weight.T
    bias = torch.zeros(layer.out_features) if base.bias is None else base.bias
    magnitudes = [magnitude.weight for magnitude in layer.lora_magnitude_vector.values()]
    rows = [tensor.detach().numpy().reshape(-1, tensor.shape[-1]) for tensor in (x, g, y, x.grad)]
    numbers = (tensor.detach().double().numpy() for tensor in (weights, bias, a, b))
    m, dm = (magnitudes[0].detach().numpy(), magnitudes[0].grad.numpy()) if magnitudes else (None, None)
    return Numbers(*rows[:2], *numbers, m), Answers(*rows[2:], a.grad.numpy(), b.grad.numpy(), dm)


def by_hand(n, s):
    """Compute the answers from the equations."""
    v = n.w + s * n.b_ @ n.a_
    norms = np.sqrt((v**2).sum(1))
    factor = np.ones(len(v)) if n.m is None else n.m / norms
    y = factor * (n.x @ v.T) + n.b
    g = factor * n.g
    dm = None if n.m is None else (n.g * (n.x @ v.T) / norms).sum(0)
    return Answers(y, g @ v, s * n.b_.T @ g.T @ n.x, s * g.T @ n.x @ n.a_.T, dm)


def assert_close(found, expected):
    for name, ours, theirs in zip(Answers._fields, found, expected, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-11, err_msg=name)
            assert np.abs(theirs).max() > 0.01


def test_output_and_every_gradient_are_those_of_the_equations(layer, kind):
    numbers, answers = asked(layer)
    assert (answers.dm is not None) == kind[0].dora
    assert_close(answers, by_hand(numbers, kind[1]))


def test_the_base_has_no_gradient(layer):
    asked(layer)
    assert all(weights.grad is None for weights in layer.get_base_layer().parameters())


def test_another_scale_is_seen(layer, kind):
    numbers, answers = asked(layer)
    with pytest.raises(AssertionError):
        assert_close(answers, by_hand(numbers, kind[1] * (1 + 1e-6)))


def test_the_norms_of_dora_have_no_gradient_of_their_own():
    """With it, A's gradient would be another: in the direction of each row nothing of it would be left."""
    adapter, s = KINDS["dora"]
    model = build("llama")
    Adapted(adapter, seed=0).choose(model)
    layer = model.get_submodule("model.layers.0.mlp.down_proj").double()
    layer.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    numbers, answers = asked(layer)
    x, g, w, _, m = (torch.from_numpy(part) for part in (numbers.x, numbers.g, numbers.w, numbers.b, numbers.m))
    a, b = (torch.from_numpy(part).requires_grad_() for part in (numbers.a_, numbers.b_))
    v = w + s * b @ a
    ((m / v.norm(dim=1) * (x @ v.T)) * g).sum().backward()
    assert np.abs(a.grad.numpy() - answers.da).max() > 0.01 * np.abs(answers.da).max()
    assert_close(answers, by_hand(numbers, s))


def test_a_fresh_adapter_begins_as_the_paper_says(kind):
    """B = 0, A uniform up to 1/√in, as that of a linear layer, and m the norms of the rows of W."""
    for name, path in LAYERS.values():
        model = build(name)
        Adapted(kind[0], seed=0).choose(model)
        layer = model.get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not b.any()
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.8 * bound < float(a.detach().abs().max()) <= bound
        base = layer.get_base_layer()
        rows = base.weight if isinstance(base, torch.nn.Linear) else base.weight.T
        for magnitude in layer.lora_magnitude_vector.values():
            torch.testing.assert_close(magnitude.weight, rows.square().sum(1).sqrt(), rtol=1e-6, atol=0)
