"""Products of activations with weights, computed otherwise than they are: of rounded activations, or in two parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from dpo_cli.modeling.policy import Policy

Product = Callable[[Tensor], Tensor]
"""Multiplies activations with a weight, and adds the bias."""

_PRODUCTS: dict[Callable[..., Any], int] = {
    functional.linear: 0, torch.addmm: 1, torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0,
    **{product: 0 for name in ("grouped_mm", "_grouped_mm") for product in (getattr(functional, name, None),
                                                                           getattr(torch, name, None)) if product},
}  # fmt: skip
"""Products that weights may be the second factor of, each with the place of the first among its arguments."""


class Multiplying(TorchFunctionMode):
    """Computes products of activations with weights in a way of its own.

    Args:
        multiply: Computes one, given the product and the activations.
    """

    def __init__(self, multiply: Callable[[Product, Tensor], Tensor]) -> None:
        super().__init__()
        self._multiply = multiply

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = _PRODUCTS.get(func)
        # A weight that is given by its keyword is not found: that product is computed as it is.
        if place is None or len(args) < place + 2 or not _is_weight(args[place + 1]):
            return func(*args, **(kwargs or {}))

        def product(activations: Tensor) -> Tensor:
            found: Tensor = func(*args[:place], activations, *args[place + 1 :], **(kwargs or {}))
            return found

        return self._multiply(product, args[place])


def _is_weight(factor: Tensor) -> bool:
    """Tell whether a factor is a weight, or a view of one; others are scores of attention."""
    return isinstance(factor if factor._base is None else factor._base, torch.nn.Parameter)


def in_two_parts(product: Product, activations: Tensor) -> Tensor:
    """Sum up a product over the halves of the activations, so that its sums are in another order."""
    half = torch.arange(activations.shape[-1], device=activations.device) < activations.shape[-1] // 2
    none = torch.zeros_like(activations)
    # The bias is in each of the three.
    return product(activations.where(half, none)) + product(activations.where(~half, none)) - product(none)


def response_logps(policy: Policy, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return log-probabilities of a response's tokens, of a row that has nothing else.

    Args:
        policy: The policy.
        prompt: The tokens before the response, at least one.
        response: Its tokens.
    """
    logps = next_logps(policy, prompt, response)[:-1]
    return logps.gather(-1, torch.tensor(response, dtype=torch.long, device=logps.device)[:, None])[:, 0].cpu()


@torch.no_grad()
def next_logps(policy: Policy, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return log-probabilities of what comes behind a prompt, and behind each token of a response, `[N + 1, V]`."""
    tokens = torch.tensor([[*prompt, *response]], device=policy.model.device)
    # Those behind the tokens of a long prompt would take far more memory than the model.
    takes = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    few = {"logits_to_keep": len(response) + 1} if takes else {}
    with policy.reading_plainly() as model:
        logits: Tensor = model(input_ids=tokens, use_cache=False, **few).logits[0, -len(response) - 1 :]
    return logits.float().log_softmax(-1)
