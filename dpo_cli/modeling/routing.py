"""How the routers of a mixture of experts spread tokens over its experts, and the loss that evens it out.

For a step of N router decisions (one for each token and layer with experts) among E experts:

    E · Σ_e f_e · P_e

where f_e is the number of decisions that have e among their top k, over N, and P_e the mean probability of e. f_e has
no gradient, and P_e is a mean: each forward pass has its share of the sum once f_e is known of the whole step.

Source: Switch Transformers, Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, as transformers computes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpo_cli.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOSS = "load_balancing_loss_func"
"""The name of the loss in the modules of transformers whose models have it."""

_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def check_routers(policy: PreTrainedModel) -> None:
    """Check that a model has routers, and that their loss is the one computed here; its weights may be missing.

    Raises:
        UserError: It has no experts, or balances them in another way.
    """
    name, where = type(policy).__name__, "`loss.router_aux`"
    if not _has_routers(policy):
        raise UserError(f"{name} has no experts whose load could be balanced", where, "leave it out")
    loss = getattr(sys.modules[type(policy).__module__], _LOSS, None)
    if loss is None or list(inspect.signature(loss).parameters) != _PARAMETERS:
        raise UserError(f"transformers has no load-balancing loss for {name}", where, "leave it out")


def experts_per_token(policy: PreTrainedModel) -> int:
    """Return how many experts a router picks for a token."""
    return int(getattr(policy, "num_experts_per_tok"))  # noqa: B009  (a module's attributes have no other type)


def expert_load(router_logits: Sequence[Tensor], top_k: int, counts: Tensor) -> Tensor:
    """Add up what each expert gets from all layers' routers.

    Args:
        router_logits: Of each layer with experts, `[R·T, E]`.
        top_k: How many experts a token goes to.
        counts: `[R·T]`, how often each token counts; 0 for padding.

    Returns:
        `[2, E]` in float32 or wider: how often each expert is picked, without gradient, and its probabilities' sum.
    """
    picked, likely = [], []
    for logits in router_logits:
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        weights = counts.to(probabilities)[:, None]
        picks = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        picked.append((weights * picks).sum(0))
        likely.append((weights * probabilities).sum(0))
    return torch.stack([torch.stack(picked).sum(0).detach(), torch.stack(likely).sum(0)])


def balance_loss(load: Tensor, whole: Tensor) -> Tensor:
    """Return the share of the load-balancing loss that some of a step's tokens have.

    Args:
        load: The `expert_load` of these tokens.
        whole: That of the whole step, without gradient.
    """
    # The probabilities of one decision add up to 1.
    num_decisions = whole[1].sum()
    return len(whole[0]) * (whole[0] * load[1]).sum() / num_decisions**2


def experts_without_adapter(policy: PreTrainedModel) -> int:
    """Return how many weights of a model with an adapter are in experts that have none; weights may be missing.

    Most architectures hold the matrices of all experts of a layer as one parameter, beside which PEFT puts no LoRA.
    """
    return sum(
        parameter.numel()
        for name, module in policy.named_modules()
        for parameter in module.parameters(recurse=False)
        if not parameter.requires_grad and _is_of_experts(name.split("."), module, parameter)
    )


def _is_of_experts(path: Sequence[str], module: nn.Module, parameter: Tensor) -> bool:
    """Tell whether a weight of the base is one of experts, and has no adapter beside it."""
    several = parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    return (several or "experts" in path) and "base_layer" not in path


def _has_routers(policy: PreTrainedModel) -> bool:
    """Tell whether any part of a model is one of those that transformers records router logits of."""
    recorded = policy.base_model.can_record_outputs.get("router_logits", [])
    kinds = tuple(one.target_class for one in (recorded if isinstance(recorded, list) else [recorded]))
    return any(isinstance(module, kinds) for module in policy.modules())
