"""Hidden states become log-probabilities of the response tokens, chunk by chunk.

The logits of a chunk of response positions exist while that chunk is worked on; logits over the whole
sequence never do, in neither direction: the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_cli.modeling.responses import Predictions, Responses, put, taken

CHUNK_BYTES = {"cuda": 2**30}
"""Size of one chunk of float32 logits on a kind of device, where it is not `SMALL_CHUNK_BYTES`.

Every chunk reads and writes the float32 gradient of the vocabulary matrix once, and on a GPU that takes as long as the
multiplications of about 400 rows do (an H100 by its data sheet: 8 bytes a number at 3.3 TB/s, 2 operations at 800
TFLOP/s and three products). 1 GiB are 2,000 rows of 128,000 words: it then is a fifth of the work, or less.
"""

SMALL_CHUNK_BYTES = 256 * 2**20
"""The same elsewhere: a CPU's multiplications take longer than its memory by far."""


@dataclass(frozen=True)
class Head:
    """A language model's last step, from hidden states to logits.

    Attributes:
        weight: `[V, H]`.
        bias: `[V]`, or None.
        scale: Factor on the logits (Cohere, Granite).
        softcap: `c` in `c · tanh(logits / c)` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probabilities of B pairs' responses under one model, in nats.

    Attributes:
        tokens: `[N]`, every chosen response's tokens, then every rejected one's.
        responses: Which of them belong to which of the 2B responses.
        log_collisions: `[N]`, log Σ π² over the vocabulary at each of those tokens, without gradient; or None.
    """

    tokens: Tensor
    responses: Responses
    log_collisions: Tensor | None = None

    @classmethod
    def of(cls, answer: Tensor, responses: Responses) -> SequenceLogps:
        """Take what a `Scorer` answers: `[N]`, or `[2, N]` with the collisions."""
        return cls(answer, responses) if answer.ndim == 1 else cls(answer[0], responses, answer[1].detach())

    @property
    def chosen(self) -> Tensor:
        """Sums over each chosen response, `[B]`."""
        return self._sums[: self.responses.num_pairs]

    @property
    def rejected(self) -> Tensor:
        """Sums over each rejected response, `[B]`."""
        return self._sums[self.responses.num_pairs :]

    @property
    def chosen_lengths(self) -> Tensor:
        """Tokens of each chosen response, `[B]`."""
        return self._lengths[: self.responses.num_pairs]

    @property
    def rejected_lengths(self) -> Tensor:
        """Tokens of each rejected response, `[B]`."""
        return self._lengths[self.responses.num_pairs :]

    def desensitized(self, alpha: float) -> SequenceLogps:
        """Return the same with tokens beyond the length of the pair's shorter response multiplied by `alpha`."""
        factors = torch.ones_like(self.tokens).masked_fill_(self.responses.beyond, alpha)
        return SequenceLogps(self.tokens * factors, self.responses)

    @property
    def _sums(self) -> Tensor:
        return self.responses.sums(self.tokens)

    @property
    def _lengths(self) -> Tensor:
        return self.responses.counts.to(self.tokens.dtype)


def token_logps(
    hidden: Tensor,
    predictions: Predictions,
    targets: Tensor,
    head: Head,
    chunk_bytes: int | None = None,
    *,
    collisions: bool = False,
) -> Tensor:
    """Return the log-probability of each target token, `[N]`, in nats and at least float32.

    Token t's is `log_softmax(logits)[target]` with the logits of the hidden state before it.

    Args:
        hidden: `[M, H]`, hidden states of all positions.
        predictions: Which of them predict the N targets. Where several targets have one in common, as behind a
            shared prompt, its logits are made once.
        targets: `[N]`, the token that follows each of them.
        head: The projection on the vocabulary.
        chunk_bytes: The most memory that the logits of one chunk may take, in bytes; by default `chunk_bytes_on` the
            device. Logits that fit into one chunk altogether are kept for the backward pass; else they are computed
            again.
        collisions: Whether to return `[2, N]`, in the second row log Σ π² over the vocabulary where each token
            stands; this row has no gradient.
    """
    apply: Callable[..., Tensor] = _TokenLogps.apply
    states = taken(hidden, predictions.states)
    num_rows = max(1, (chunk_bytes or chunk_bytes_on(hidden.device.type)) // (4 * head.weight.shape[0]))
    logits = head.weight, head.bias, head.scale, head.softcap
    found = apply(states, predictions.rows, targets, *logits, predictions.chunks(num_rows), collisions)
    return found if collisions else found[0]


def chunk_bytes_on(device: str) -> int:
    """Return the size of one chunk of float32 logits on a kind of device, as torch names it, in bytes."""
    return CHUNK_BYTES.get(device, SMALL_CHUNK_BYTES)


class _TokenLogps(torch.autograd.Function):
    """The chunked projection.

    With p the softmax of a row's logits z, d logp / d z = onehot(target) − p. A row with several targets, each
    with a gradient g of its own, so has d loss / d z = Σ g · onehot(target) − (Σ g) · p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        rows: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunks: list[tuple[slice, Tensor]],
        collisions: bool,
    ) -> Tensor:
        """Compute the log-probabilities chunk by chunk; keep no logits but those of an only chunk."""
        # Decided here because autocast is off again when the backward pass runs.
        project = _Projection(weight.to(_compute_dtype(states)), bias, scale, softcap)
        found = torch.empty((1 + collisions, len(targets)), dtype=project.dtype, device=states.device)
        all_logps = slope = None
        for chunk, members in chunks:
            all_logps, slope = project(states[chunk])
            place = rows[members] - chunk.start
            put(found[0], members, all_logps[place, targets[members]])
            if collisions:
                put(found[1], members, (2 * all_logps).logsumexp(-1)[place])
        ctx.save_for_backward(states, rows, targets, weight)
        ctx.compute, ctx.logits, ctx.chunks = project.matrix.dtype, (bias, scale, softcap), chunks
        # No saved tensors. The backward pass begins here: until then only the loss is computed, which takes no memory,
        # so that the matrix in lower precision costs nothing while it waits, and is let go before the layers' turn.
        # The log-probabilities give their memory to the gradient; a second backward pass makes both again.
        only = (all_logps, slope) if len(chunks) == 1 else None
        ctx.kept = (project.matrix, only) if any(ctx.needs_input_grad) else None
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each chunk's probabilities again, and from them the gradients of states, weight and bias."""
        grad_logps = gradients[0][0]
        states, rows, targets, weight = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        matrix, only = kept or (weight.to(ctx.compute), None)
        project = _Projection(matrix, *ctx.logits)
        grad_states = torch.empty_like(states)
        grad_weight = grad_bias = None
        for chunk, members in ctx.chunks:
            all_logps, slope = only or project(states[chunk])
            place = rows[members] - chunk.start
            weights = grad_logps[members].to(project.dtype)
            # d loss / d z, in the memory of the log-probabilities.
            grad = all_logps.exp_()
            totals = put(grad.new_zeros(len(grad)), place, weights, added=True)
            grad *= -totals[:, None]
            # On one axis the additions have an order, whatever the threads; a row may have one target twice.
            put(grad.view(-1), place * grad.shape[1] + targets[members], weights, added=True)
            if slope is not None:
                grad *= slope
            if project.scale != 1.0:
                grad *= project.scale
            if ctx.needs_input_grad[4]:
                grad_bias = _plus(grad_bias, grad.sum(0))
            grad = grad.to(matrix.dtype)
            grad_states[chunk] = grad @ matrix
            if ctx.needs_input_grad[3]:
                grad_weight = _plus_product(grad_weight, grad.T, states[chunk].to(matrix.dtype), project.dtype)
        # Autograd makes of them what the parameters ask for (`grad_dtype`).
        return grad_states, None, None, grad_weight, grad_bias, None, None, None, None


@dataclass(frozen=True)
class _Projection:
    """From hidden states to log-probabilities of the whole vocabulary, in the type that the `matrix` is cast to."""

    matrix: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """What log-probabilities are held in, and gradients added up."""
        return torch.promote_types(self.matrix.dtype, torch.float32)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `[n, V]` log-probabilities, and the soft cap's slope at the logits where there is a soft cap."""
        logits = _product(states.to(self.matrix.dtype), self.matrix.T, self.dtype)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is None:
            return _log_softmax_(logits), None
        capped = torch.tanh(logits / self.softcap)
        return _log_softmax_(capped * self.softcap), 1 - capped.square()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply two matrices of one type into another; on CUDA nothing is rounded to the first type on the way."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != dtype and left.device.type == "cuda":
            return torch.mm(left, right, out_dtype=dtype)
        return (left @ right).to(dtype)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a product of two matrices to a total of its own type, in the total's memory; None: nothing yet.

    The first one becomes the total: zeros to add to would be one more matrix of the vocabulary's size to write.
    """
    if total is None:
        return _product(left, right, dtype)
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == dtype:
            return total.addmm_(left, right)
        if left.device.type == "cuda":
            return torch.addmm(total, left, right, out_dtype=dtype, out=total)
        return total.add_(left @ right)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _log_softmax_(logits: Tensor) -> Tensor:
    """Turn logits into log-probabilities in the memory they stand in."""
    return torch.log_softmax(logits, -1, out=logits)


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Return what autocast would multiply in here, or the hidden states' own type."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
