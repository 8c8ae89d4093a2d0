"""Proof, on real pairs, that a model answers under a layout as its own logits say."""

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
from dpo_cli.modeling.attention.trees import CannotPack
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.compiled import compile_layers
from dpo_cli.modeling.layouts import PADDED, Layout
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.modeling.precision import Precision
from dpo_cli.modeling.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIRST_WEIGHTS = 12
"""Of how many weights the gradient is compared: about those of a layer."""

REFUSALS = (CannotPack, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
"""What architectures that cannot be packed raise: they were never made for it, and say so in their own ways."""


@dataclass(frozen=True)
class Proof:
    """How far log-probabilities under a layout are from the model's own, or why it cannot be used.

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
    pairs: Sequence[TokenizedPair],
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    beside: Sequence[TokenizedPair] = (),
    longer: Sequence[TokenizedPair] = (),
    trained: bool = True,
) -> Proof:
    """Compare log-probabilities under a layout with those of the model's own logits; leave it prepared for the layout.

    Args:
        model: The model, with its own attention.
        layout: The layout that is to be proved.
        pairs: Pairs whose response tokens are compared. Of them all logits are made.
        autocast: Opens the precision that the run computes in.
        beside: Pairs before them in the same forward pass, which must not matter.
        longer: Pairs that are compared as the padded layout has them, without gradient and whole logits.
        trained: Whether the gradient is compared as well.

    Raises:
        UserError: The model fails, or its gradient is zero.
    """
    score, weights = Scorer(model), _first_weights(model) if trained else []
    own = PADDED.batch(range(len(pairs)), pairs).to(model.device)
    with asking(model), autocast():
        expected, expected_norm = _answers(score.own_logps, own, 0, weights)
        if trained and not expected_norm:
            weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
            expected, expected_norm = _answers(score.own_logps, own, 0, weights)
        expected = torch.cat([expected, *_scored_alone(score, PADDED, longer)])
    if not torch.isfinite(expected).all():
        return Proof()
    if trained and not expected_norm:
        hint = "check the weights, which an interrupted save leaves at zero, and the factors in config.json"
        raise UserError("no weight of the model has a gradient: nothing would be learned", type(model).__name__, hint)
    try:
        layout.prepare(model)
        together = [*beside, *pairs]
        batch = layout.batch(range(len(together)), together).to(model.device)
        with autocast():
            found, norm = _answers(score, batch, len(beside), weights)
            found = torch.cat([found, *_scored_alone(score, layout, longer)])
    except Exception as error:
        if is_out_of_memory(error) or not (isinstance(error, REFUSALS) or _of_a_kernel(error)):
            raise
        return Proof(refusal=_reason(error))
    difference = float((found - expected).abs().max())
    return Proof(difference, abs(norm - expected_norm) / expected_norm if trained else 0.0)


def prove_compiled(
    model: PreTrainedModel, batch: PairBatch, autocast: Callable[[], AbstractContextManager[None]], backend: str
) -> Proof:
    """Compare log-probabilities with compiled decoder layers with those of the layers as they are; leave them compiled.

    Args:
        model: The model, which reads the layout of the batch.
        batch: Pairs of the run, on the model's device.
        autocast: Opens the precision that the run computes in.
        backend: The compiler, by its name in torch.

    Raises:
        UserError: Layers would have to be compiled too often.
    """
    score, weights = Scorer(model), _first_weights(model)
    with autocast():
        expected, expected_norm = _answers(score, batch, 0, weights)
    compile_layers(model, backend)
    try:
        with autocast():
            found, norm = _answers(score, batch, 0, weights)
    except Exception as error:
        if is_out_of_memory(error) or not (isinstance(error, REFUSALS) or _of_a_kernel(error)):
            raise
        return Proof(refusal=_first_line(error))
    share = abs(norm - expected_norm) / expected_norm if expected_norm else 0.0
    return Proof(float((found - expected).abs().max()), share)


@contextlib.contextmanager
def asking(model: PreTrainedModel) -> Iterator[None]:
    """Say of a model that fails on its first pairs that it does: no setting of the run is at fault.

    Raises:
        UserError: It fails.
    """
    try:
        yield
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        what = f"the model fails on the first pairs, {type(error).__name__}: {_first_line(error)}"
        raise UserError(what, type(model).__name__, "check the values in its config.json") from error


def _answers(
    score: Callable[[PairBatch], Tensor], batch: PairBatch, first: int, weights: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """Return the log-probabilities of the pairs of a batch from one on, and the norm of a gradient of some weights.

    It is the gradient of what pulls the chosen responses up and the rejected ones down, half as hard.
    """
    with torch.set_grad_enabled(bool(weights)):
        responses = score(batch).split(list(batch.lengths))
    num_pairs = len(batch.pairs)
    chosen, rejected = torch.cat(responses[first:num_pairs]), torch.cat(responses[num_pairs + first :])
    norm = 0.0
    if weights:
        gradients = torch.autograd.grad(chosen.sum() - rejected.sum() / 2, weights, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
    return torch.cat([chosen, rejected]).detach(), norm


@torch.no_grad()
def _scored_alone(score: Scorer, layout: Layout, pairs: Sequence[TokenizedPair]) -> list[Tensor]:
    """Return the log-probabilities of pairs, each in a forward pass of its own."""
    return [score(layout.batch([0], [pair]).to(score.policy.device)) for pair in pairs]


def _first_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights next to the embedding: their gradient comes through all layers, and takes little more."""
    embeddings = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    inner = [weights for weights in model.parameters() if weights.requires_grad and id(weights) not in embeddings]
    return list(inner[:_FIRST_WEIGHTS])


def _reason(error: Exception) -> str:
    """Return what a refusal says; what a model was never made for it says in terms of its code."""
    first = _first_line(error)
    return first if isinstance(error, CannotPack) else f"it fails on packed pairs, {type(error).__name__}: {first}"


def _of_a_kernel(error: Exception) -> bool:
    """Tell whether an error is of a kernel's compiler, which has its own for cards that lack what a kernel takes."""
    return type(error).__module__.partition(".")[0] == "triton"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    # torch's compiler names in its first line who raised, and in the second what.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
