"""Proof, on real pairs, that a model answers the same whether pairs are padded or packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.attention import CannotPack
from dpo_cli.modeling.batch import Layout, Packed, Padded
from dpo_cli.modeling.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_TOLERANCE = {"no": 1e-4, "bf16": 0.3, "fp16": 0.05}
"""Largest difference of one token's log-probability, in nats, that rounding explains, by Accelerate's name of the
precision that is computed in."""

NORM_TOLERANCE = {"no": 1e-3, "bf16": 0.05, "fp16": 0.02}
"""The same of the gradient's norm, as a share of it."""

REFUSALS = (CannotPack, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
"""What architectures that cannot be packed raise: they were never made for it, and say so in their own ways."""


@dataclass(frozen=True)
class Proof:
    """How far the packed layout is from the padded one, or why it cannot be had.

    Attributes:
        difference: The largest difference of a response token's log-probability, in nats.
        norm_difference: The difference of the gradient's norm, as a share of it.
        refusal: What the model said where it cannot read packed pairs at all; empty where it can.
    """

    difference: float = math.inf
    norm_difference: float = math.inf
    refusal: str = ""

    def fails(self, precision: str) -> str:
        """Say what is wrong under a precision, in a few words; empty: nothing."""
        if self.refusal:
            return self.refusal
        if not self.difference <= TOKEN_TOLERANCE[precision]:
            return f"log-probabilities differ by {self.difference:.2g} nats a token"
        if not self.norm_difference <= NORM_TOLERANCE[precision]:
            return f"the gradient's norm differs by {self.norm_difference:.2%}"
        return ""


def prove(
    model: PreTrainedModel,
    seen: Sequence[TokenizedPair],
    trained: Sequence[TokenizedPair],
    autocast: Callable[[], AbstractContextManager[None]],
) -> Proof:
    """Compare the packed layout with the padded one; leave the model prepared for the packed one.

    Args:
        model: The model; its gradients are cleared.
        seen: Pairs whose response tokens are all compared.
        trained: Pairs for which the gradient is compared; none: the gradient is not looked at.
        autocast: Opens the precision that the run computes in.
    """
    padded, packed = Padded(), Packed()
    with autocast():
        expected, expected_norm = _answers(model, padded, seen), _gradient_norm(model, padded, trained)
    if not torch.isfinite(expected).all():
        # A model that is broken under both layouts; the checks that follow say so.
        packed.prepare(model)
        return Proof(0.0, 0.0)
    try:
        packed.prepare(model)
        with autocast():
            found, norm = _answers(model, packed, seen), _gradient_norm(model, packed, trained)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        # A backward pass that broke off has left a part of its gradients behind.
        model.zero_grad(set_to_none=True)
        return Proof(refusal=_reason(error))
    difference = float((found - expected).abs().max())
    return Proof(difference, abs(norm - expected_norm) / expected_norm if trained else 0.0)


@torch.no_grad()
def _answers(model: PreTrainedModel, layout: Layout, pairs: Sequence[TokenizedPair]) -> Tensor:
    """Return the log-probabilities of all response tokens; of each pair alone, then of all of them together."""
    scorer = Scorer(model)
    cuts = [[pair] for pair in pairs] if isinstance(layout, Padded) else [list(pairs)]
    by_cut = []
    for cut in cuts:
        batch = layout.batch(range(len(cut)), cut).to(model.device)
        tokens = scorer(batch).split(list(batch.lengths))
        by_cut.append((tokens[: len(cut)], tokens[len(cut) :]))
    return torch.cat([t for chosen, _ in by_cut for t in chosen] + [t for _, rejected in by_cut for t in rejected])


def _gradient_norm(model: PreTrainedModel, layout: Layout, pairs: Sequence[TokenizedPair]) -> float:
    """Return the norm of the gradient of what pulls chosen responses up and rejected ones down, half as hard."""
    if not pairs:
        return 0.0
    batch = layout.batch(range(len(pairs)), pairs).to(model.device)
    tokens = Scorer(model)(batch)
    num_chosen = sum(batch.lengths[: len(pairs)])
    (tokens[:num_chosen].sum() - tokens[num_chosen:].sum() / 2).backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return float(torch.stack(norms).norm())


def _reason(error: Exception) -> str:
    """Return what a refusal says; what a model was never made for it says in terms of its code."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, CannotPack) else f"it fails on packed pairs, {type(error).__name__}: {first}"
