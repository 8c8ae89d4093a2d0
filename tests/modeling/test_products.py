"""Products of activations with weights are computed in another way; all others, and attention's, as they are."""

from __future__ import annotations

import torch
from torch.nn import Parameter
from torch.nn.functional import linear

from dpo_cli.modeling.products import Multiplying, in_two_parts


def test_a_product_in_two_parts_is_the_same_but_for_rounding() -> None:
    torch.manual_seed(0)
    activations, weight, bias = torch.randn(5, 64), Parameter(torch.randn(8, 64)), torch.randn(8)
    right = linear(activations, weight, bias)
    with Multiplying(in_two_parts):
        found = linear(activations, weight, bias)
    assert not torch.equal(found, right)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


def test_a_product_whose_weight_is_given_by_keyword_is_computed_as_it_is() -> None:
    activations, weight = torch.randn(5, 64), Parameter(torch.randn(8, 64))
    with Multiplying(in_two_parts):
        assert torch.equal(linear(activations, weight=weight), linear(input=activations, weight=weight))
