"""Proof, on real pairs, that a model answers the same whether pairs are padded or packed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpo_cli.data.records import TokenizedPair
from dpo_cli.errors import UserError
from dpo_cli.modeling.attention import CannotPack
from dpo_cli.modeling.layouts import PADDED, Layout
from dpo_cli.modeling.precision import Precision
from dpo_cli.modeling.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFUSALS = (CannotPack, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
"""What architectures that cannot be packed raise: they were never made for it, and say so in their own ways."""


@dataclass(frozen=True)
class Proof:
    """How far a layout is from the padded one, or why it cannot be used.

    Attributes:
        difference: The largest difference of a response token's log-probability, in nats.
        norm_difference: The difference of the gradient's norm, as a share of it.
        refusal: What the model said where it cannot read packed pairs at all; empty where it can.
    """

    difference: float = math.inf
    norm_difference: float = math.inf
    refusal: str = ""

    def fails(self, precision: Precision) -> str:
        """Say what is wrong under a precision, in a few words; empty: nothing."""
        if self.refusal:
            return self.refusal
        if not self.difference <= precision.token_tolerance:
            return f"log-probabilities differ by {self.difference:.2g} nats per token"
        if not self.norm_difference <= precision.norm_tolerance:
            return f"the gradient's norm differs by {self.norm_difference:.2%}"
        return ""


def prove(
    model: PreTrainedModel,
    layout: Layout,
    seen: Sequence[TokenizedPair],
    trained: Sequence[TokenizedPair],
    autocast: Callable[[], AbstractContextManager[None]],
) -> Proof:
    """Compare a layout with the padded one; leave the model prepared for the layout.

    Args:
        model: The model; its gradients are cleared.
        layout: The layout that is to be proved.
        seen: Pairs whose response tokens are all compared, without a gradient.
        trained: Further pairs, for which the gradient is compared as well; none: it is not looked at.
        autocast: Opens the precision that the run computes in.

    Raises:
        UserError: The model fails, or its gradient is zero.
    """
    with asking(model), autocast():
        expected, expected_norm = _answers(model, PADDED, seen, trained)
    if not torch.isfinite(expected).all():
        # A model that is broken under both layouts; the checks that follow say so.
        layout.prepare(model)
        return Proof(0.0, 0.0)
    if trained and not expected_norm:
        hint = "check the weights, which an interrupted save leaves at zero, and the factors in config.json"
        raise UserError("no weight of the model has a gradient: nothing would be learned", type(model).__name__, hint)
    try:
        layout.prepare(model)
        with autocast():
            found, norm = _answers(model, layout, seen, trained)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        # A backward pass that broke off has left a part of its gradients behind.
        model.zero_grad(set_to_none=True)
        return Proof(refusal=_reason(error))
    difference = float((found - expected).abs().max())
    return Proof(difference, abs(norm - expected_norm) / expected_norm if trained else 0.0)


@contextlib.contextmanager
def asking(model: PreTrainedModel) -> Iterator[None]:
    """Say of a model that fails on its first pairs that it does: no setting of the run is at fault.

    Raises:
        UserError: It fails.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        what = f"the model fails on the first pairs, {type(error).__name__}: {_first_line(error)}"
        raise UserError(what, type(model).__name__, "check the values in its config.json") from error


def _answers(
    model: PreTrainedModel, layout: Layout, seen: Sequence[TokenizedPair], trained: Sequence[TokenizedPair]
) -> tuple[Tensor, float]:
    """Return the log-probabilities of all response tokens, pair by pair, and the norm of a gradient.

    It is the gradient of what pulls the chosen responses of `trained` up and the rejected ones down, half as hard.
    """
    score = Scorer(model)
    answers, norm = [], 0.0
    with torch.no_grad():
        # What is compared with goes through alone, what is proved together with all others.
        for cut in [[pair] for pair in seen] if not layout.needs_proof else [list(seen)] if seen else []:
            batch = layout.batch(range(len(cut)), cut).to(model.device)
            answers += _by_pair(score(batch), batch.lengths)
    if trained:
        batch = layout.batch(range(len(trained)), trained).to(model.device)
        tokens = score(batch)
        num_chosen = sum(batch.lengths[: len(trained)])
        (tokens[:num_chosen].sum() - tokens[num_chosen:].sum() / 2).backward()
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        norm = float(torch.stack(norms).norm())
        model.zero_grad(set_to_none=True)
        answers += _by_pair(tokens.detach(), batch.lengths)
    return torch.cat(answers), norm


def _by_pair(tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return the tokens of each pair's chosen and rejected response, pair by pair."""
    responses = tokens.split(list(lengths))
    return [
        torch.cat(pair) for pair in zip(responses[: len(responses) // 2], responses[len(responses) // 2 :], strict=True)
    ]


def _reason(error: Exception) -> str:
    """Return what a refusal says; what a model was never made for it says in terms of its code."""
    first = _first_line(error)
    return first if isinstance(error, CannotPack) else f"it fails on packed pairs, {type(error).__name__}: {first}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
