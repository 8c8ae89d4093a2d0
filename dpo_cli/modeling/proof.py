"""Proof, on real pairs, that a model answers under a layout as its own logits say."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpo_cli.data.records import TokenizedPair
from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.trees import CannotPack
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.broken_off import is_broken_off
from dpo_cli.modeling.compiled import compile_layers
from dpo_cli.modeling.layouts import PADDED, Layout
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.modeling.precision import Precision
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.modeling.shards import added_up, gradients_of, local
from dpo_cli.modeling.upcast import in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIRST_WEIGHTS = 12
"""Of how many weights the gradient is compared: about those of a layer."""

Ask = Callable[[PairBatch], Tensor]
"""Returns the log-probability of each response token of a batch."""

REFUSALS = (CannotPack, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)
"""What architectures that cannot be packed raise: they were never made for it, and say so in their own ways."""


NORM_TOLERANCE = 1e-3
"""The largest difference of the gradient's norm in float32, as a share of it, that rounding explains."""

NOISE_FACTOR = 3
"""How many times as far as rounding takes the padded layout another one may be from it in lower precision.

Both are rounded, so that √2 is to be expected.
"""


class Rounding(NamedTuple):
    """How far answers in lower precision are from others, beside the distance that rounding explains.

    Attributes:
        logps: The root mean square over response tokens, in nats, between a layout and the padded one.
        logps_noise: The same between the padded layout and float32, or another padded batch: the larger one.
        gradient: The norm of the gradients' difference between a layout and the padded one, as a share of the norm.
        gradient_noise: The same as for `logps_noise`.
    """

    logps: float
    logps_noise: float
    gradient: float
    gradient_noise: float


@dataclass(frozen=True)
class Proof:
    """How far log-probabilities under a layout are from the model's own, or why it cannot be used.

    Attributes:
        difference: The largest difference of a response token's log-probability in float32, in nats.
        norm_difference: The difference of the gradient's norm in float32, as a share of it.
        rounding: Distances in the precision of the run, where that is a lower one.
        refusal: What the model said where it cannot read packed pairs at all; empty where it can.
        only_lower: Whether what was proved computes in the run's precision alone, so that float32 shows nothing.
    """

    difference: float = math.inf
    norm_difference: float = math.inf
    rounding: Rounding | None = None
    refusal: str = ""
    only_lower: bool = False

    def fails(self, precision: Precision) -> str:
        """Say what is wrong under a precision, in a few words; empty: nothing."""
        if self.refusal:
            return self.refusal
        if not self.difference <= precision.exactness:
            return f"log-probabilities differ by {self.difference:.2g} nats per token"
        if not self.norm_difference <= NORM_TOLERANCE:
            return f"the gradient's norm differs by {self.norm_difference:.2%}"
        if self.rounding is None:
            return ""
        logps, logps_noise, gradient, gradient_noise = self.rounding
        # What is exact in float32 may be as far from it.
        if not logps <= NOISE_FACTOR * max(logps_noise, precision.exactness):
            where = f"in {precision.name} log-probabilities differ by {logps:.2g} nats per token"
            return f"{where}, and rounding explains {logps_noise:.2g}"
        if not gradient <= NOISE_FACTOR * max(gradient_noise, NORM_TOLERANCE):
            where = f"in {precision.name} the gradient differs by {gradient:.2%}"
            return f"{where}, and rounding explains {gradient_noise:.2%}"
        return ""

    def lines(self, layout: Layout, precision: Precision, *, trained: bool) -> Iterator[str]:
        """Say what was shown of a layout under a precision; of gradients where anything trains."""
        nats, share = f"{self.difference:.1g} nats per token", f"; its gradient's norm by {self.norm_difference:.1g}"
        where = " in float32" if precision.is_lower else ""
        if not self.only_lower:
            given = f"{layout.described} gives the same as {PADDED.name}{where}"
            yield f"{given}, up to {nats}{share if trained else ''}"
        if self.rounding:
            logps, logps_noise, gradient, gradient_noise = self.rounding
            share = f"; gradients {gradient:.1%} and {gradient_noise:.1%}" if trained else ""
            yield (
                f"in {precision.name} {layout.described} is {logps:.2g} nats per token from {PADDED.name}, where "
                f"rounding explains {logps_noise:.2g}{share}"
            )


def prove(
    score: Scorer,
    layout: Layout,
    pairs: Sequence[TokenizedPair],
    precision: Precision,
    *,
    longer: Sequence[TokenizedPair] = (),
    trained: bool = True,
    anywhere: Callable[[bool], bool] = bool,
) -> Proof:
    """Compare log-probabilities under a layout with those of the model's own logits; leave it prepared for the layout.

    Whether they are the same is shown in float32, in which the model computes for a while whatever the run's precision.
    In a lower one they differ by rounding: there they may be as far from the padded layout's as that is from float32,
    `NOISE_FACTOR` times.

    Args:
        score: What answers; its model has its own attention.
        layout: The layout that is to be proved.
        pairs: Pairs that share a forward pass under the layout, each in one of its own otherwise. Of each in turn all
            logits are made.
        precision: What the run computes in.
        longer: Pairs that are compared as the padded layout has them, without gradient and whole logits.
        trained: Whether the gradient is compared as well.
        anywhere: Tells whether something holds in any process, so that all of them make the same passes.

    Raises:
        UserError: The model fails, or its gradient is zero.
    """
    model = score.policy
    weights = _first_weights(model) if trained else []
    with asking(model):
        with in_float32(model):
            expected = _alone(score.own_logps, score, pairs, longer, weights)
            if trained and anywhere(not expected.norm):
                weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
                expected = _alone(score.own_logps, score, pairs, longer, weights)
        rounded = _padded_rounded(score, precision, pairs, longer, weights)
    if anywhere(not torch.isfinite(expected.logps).all()):
        return Proof()
    if trained and not expected.norm:
        hint = "check the weights, which an interrupted save leaves at zero, and the factors in config.json"
        raise UserError("no weight of the model has a gradient: nothing would be learned", type(model).__name__, hint)
    try:
        layout.prepare(model)
        proof = Proof(0.0, 0.0, only_lower=True)
        # Some kernels compute in 16 bits alone.
        with contextlib.suppress(*[CannotPack] * precision.is_lower), in_float32(model):
            found = _together(score, layout, pairs, longer, weights)
            proof = Proof(found.largest(expected), found.norm_from(expected))
        if not rounded or anywhere(bool(proof.fails(precision))):
            return proof
        with precision.autocast(model.device.type):
            found = _together(score, layout, pairs, longer, weights)
    except Exception as error:
        if not _is_refusal(error):
            raise
        return Proof(refusal=_reason(error))
    return dataclasses.replace(proof, rounding=found.rounded_beside(rounded[0], expected, *rounded[1:]))


@dataclass(frozen=True)
class _Answers:
    """What pairs are answered with.

    Attributes:
        logps: The log-probability of each response token, pair by pair, in nats.
        gradient: That of some weights of what pulls chosen responses up and rejected ones down, half as hard.
    """

    logps: Tensor
    gradient: Sequence[Tensor]

    @property
    def norm(self) -> float:
        """The norm of the gradient."""
        return _norm(self.gradient)

    def largest(self, others: _Answers) -> float:
        """Return the largest difference of a log-probability from others', in nats."""
        return float((self.logps - others.logps).abs().max())

    def norm_from(self, others: _Answers) -> float:
        """Return the difference of the gradient's norm from others', as a share of theirs."""
        return abs(self.norm - others.norm) / others.norm if others.norm else 0.0

    def rounded_beside(self, rounded: _Answers, *exact: _Answers) -> Rounding:
        """Return how far these are from answers that are rounded as well, which are some way from others."""
        (logps, gradient), ways = self.far_from(rounded), [rounded.far_from(others) for others in exact]
        return Rounding(logps, max(way[0] for way in ways), gradient, max(way[1] for way in ways))

    def far_from(self, others: _Answers) -> tuple[float, float]:
        """Return the distances of log-probabilities and gradient from others', as in `Rounding`."""
        differences = [mine.float() - theirs for mine, theirs in zip(self.gradient, others.gradient, strict=True)]
        share = _norm(differences) / others.norm if differences else 0.0
        return distance(self.logps, others.logps), share


def distance(logps: Tensor, others: Tensor) -> float:
    """Return the root mean square of the differences of log-probabilities, in nats per token."""
    return float((logps - others).square().mean().sqrt())


def prove_compiled(score: Scorer, batch: PairBatch, precision: Precision, backend: str) -> Proof:
    """Compare log-probabilities with compiled decoder layers with those of the layers as they are; leave them compiled.

    In a lower precision both may be as far from each other as rounding takes the layers as they are from float32,
    `NOISE_FACTOR` times.

    Args:
        score: What answers; its model reads the layout of the batch.
        batch: Pairs of the run, on the model's device.
        precision: What the run computes in.
        backend: The compiler, by its name in torch.

    Raises:
        UserError: Layers would have to be compiled too often.
    """
    model, exact = score.policy, None
    weights, device = _first_weights(model), model.device.type
    with contextlib.suppress(CannotPack):
        if precision.is_lower:
            with in_float32(model):
                exact = _answers(score, score, batch, weights)
    with precision.autocast(device):
        expected = _answers(score, score, batch, weights)
    compile_layers(model, backend)
    try:
        with precision.autocast(device):
            found = _answers(score, score, batch, weights)
    except Exception as error:
        if not _is_refusal(error):
            raise
        return Proof(refusal=_first_line(error))
    if not precision.is_lower:
        return Proof(found.largest(expected), found.norm_from(expected))
    return Proof(0.0, 0.0, found.rounded_beside(expected, exact or expected), only_lower=True)


@contextlib.contextmanager
def asking(model: PreTrainedModel) -> Iterator[None]:
    """Say of a model that fails on its first pairs that it does: no setting of the run is at fault.

    Raises:
        UserError: It fails.
    """
    try:
        yield
    except REFUSALS as error:
        if is_out_of_memory(error) or is_broken_off(error):
            raise
        what = f"the model fails on the first pairs, {type(error).__name__}: {_first_line(error)}"
        raise UserError(what, type(model).__name__, "check the values in its config.json") from error


def _alone(
    ask: Ask, score: Scorer, pairs: Sequence[TokenizedPair], longer: Sequence[TokenizedPair], weights: Sequence[Tensor]
) -> _Answers:
    """Ask for each pair by itself, padded; for the longer ones a scorer without gradient."""
    answers = [_answers(ask, score, PADDED.batch([0], [pair]).to(score.policy.device), weights) for pair in pairs]
    gradient = [sum(part.float() for part in parts) for parts in zip(*(one.gradient for one in answers), strict=True)]
    return _Answers(torch.cat([*(one.logps for one in answers), *_scored_alone(score, PADDED, longer)]), gradient)


def _padded_rounded(
    score: Scorer,
    precision: Precision,
    pairs: Sequence[TokenizedPair],
    longer: Sequence[TokenizedPair],
    weights: Sequence[Tensor],
) -> list[_Answers]:
    """Ask in the padded layout, for each pair by itself and for all together, where the precision is a lower one."""
    if not precision.is_lower:
        return []
    with precision.autocast(score.policy.device.type):
        return [_alone(score, score, pairs, longer, weights), _together(score, PADDED, pairs, longer, weights)]


def _together(
    score: Scorer,
    layout: Layout,
    pairs: Sequence[TokenizedPair],
    longer: Sequence[TokenizedPair],
    weights: Sequence[Tensor],
) -> _Answers:
    """Ask a scorer for pairs in one forward pass; for the longer ones each by itself, without gradient."""
    answers = _answers(score, score, layout.batch(range(len(pairs)), pairs).to(score.policy.device), weights)
    return _Answers(torch.cat([answers.logps, *_scored_alone(score, layout, longer)]), answers.gradient)


def _answers(ask: Ask, score: Scorer, batch: PairBatch, weights: Sequence[Tensor]) -> _Answers:
    """Ask for the pairs of a batch."""
    with torch.set_grad_enabled(bool(weights)):
        responses = ask(batch).split(list(batch.lengths))
    chosen, rejected = responses[: len(batch.pairs)], responses[len(batch.pairs) :]
    gradient: Sequence[Tensor] = []
    if weights:
        pull = torch.cat(chosen).sum() - torch.cat(rejected).sum() / 2
        gradient = gradients_of(pull, weights, score)
    logps = torch.cat([response for pair in zip(chosen, rejected, strict=True) for response in pair]).detach()
    return _Answers(logps, gradient)


def _norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm of some tensors together."""
    norms = [torch.linalg.vector_norm(local(tensor), dtype=torch.float32) for tensor in tensors]
    return float(torch.stack(added_up([norm.square() for norm in norms], tensors)).sum().sqrt()) if norms else 0.0


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


def _is_refusal(error: Exception) -> bool:
    """Tell whether an error says that a model, or a kernel on this card, cannot do what was asked; memory aside."""
    # A kernel's compiler has errors of its own for cards that lack what it takes.
    of_a_kernel = type(error).__module__.partition(".")[0] == "triton"
    of_the_run = is_out_of_memory(error) or is_broken_off(error)
    return (of_a_kernel or isinstance(error, REFUSALS)) and not of_the_run


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    # torch's compiler names in its first line who raised, and in the second what.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
