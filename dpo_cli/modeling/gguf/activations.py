"""What llama.cpp rounds beside the weights: its products of matrices take activations in the type of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dpo_cli.modeling.gguf.types import GgufType, rounded, type_of
from dpo_cli.modeling.products import Multiplying, Product, response_logps

if TYPE_CHECKING:
    from dpo_cli.modeling.policy import Policy


def rounded_logps(policy: Policy, kind: GgufType, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return log-probabilities of a response's tokens with activations that are rounded as llama.cpp rounds them.

    Args:
        policy: The policy, of the weights that are in the file.
        kind: The type that the file keeps them in.
        prompt: The tokens before the response, at least one.
        response: Its tokens.
    """
    # Activations come in blocks of 8 bits, however few bits the weights have.
    held: GgufType = kind if kind in ("f32", "f16", "bf16") else "q8_0"

    def of_rounded(product: Product, activations: Tensor) -> Tensor:
        return product(rounded(activations, type_of("", activations.shape, held)))

    with Multiplying(of_rounded):
        return response_logps(policy, prompt, response)
