"""What llama.cpp rounds beside the weights: its products of matrices take activations in the type of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dpo_cli.modeling.gguf.types import GgufType, rounded, type_of

if TYPE_CHECKING:
    from dpo_cli.modeling.policy import Policy

_PRODUCTS: dict[Callable[..., Any], int] = {
    functional.linear: 0, torch.addmm: 1, torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0,
    **{product: 0 for name in ("grouped_mm", "_grouped_mm") for product in (getattr(functional, name, None),
                                                                           getattr(torch, name, None)) if product},
}  # fmt: skip
"""Products that weights may be the second factor of, each with the place of the first among its arguments."""


class _Rounding(TorchFunctionMode):
    """Rounds the activations that are multiplied with weights, as llama.cpp does on a CPU.

    Args:
        kind: The type that the file's weights are in.
    """

    def __init__(self, kind: GgufType) -> None:
        super().__init__()
        # Activations come in blocks of 8 bits, however few bits the weights have.
        self._kind: GgufType = kind if kind in ("f32", "f16", "bf16") else "q8_0"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (place := _PRODUCTS.get(func)) is not None and _is_weight(args[place + 1]):
            given = args[place]
            args = (*args[:place], rounded(given, type_of("", given.shape, self._kind)), *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def _is_weight(factor: Tensor) -> bool:
    """Tell whether a factor is a weight, or a view of one; others are scores of attention."""
    return isinstance(factor if factor._base is None else factor._base, torch.nn.Parameter)


@torch.no_grad()
def rounded_logps(policy: Policy, kind: GgufType, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return log-probabilities of a response's tokens with activations that are rounded as llama.cpp rounds them.

    Args:
        policy: The policy, of the weights that are in the file.
        kind: The type that the file keeps them in.
        prompt: The tokens before the response, at least one.
        response: Its tokens.
    """
    tokens = torch.tensor([[*prompt, *response]], device=policy.model.device)
    with policy.reading_plainly() as model, _Rounding(kind):
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps: Tensor = logits.float().log_softmax(-1)
    return logps.gather(-1, tokens[0, len(prompt) :, None])[:, 0].cpu()
