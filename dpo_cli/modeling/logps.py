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

CHUNK_BYTES = 128 * 2**20
"""Size of one chunk of float32 logits."""


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
        lengths: Tokens of each response, `2B` of them, in the same order.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    @property
    def chosen(self) -> Tensor:
        """Sums over each chosen response, `[B]`."""
        return self._sums()[: len(self.lengths) // 2]

    @property
    def rejected(self) -> Tensor:
        """Sums over each rejected response, `[B]`."""
        return self._sums()[len(self.lengths) // 2 :]

    @property
    def chosen_lengths(self) -> Tensor:
        """Tokens of each chosen response, `[B]`."""
        return self.tokens.new_tensor(self.lengths[: len(self.lengths) // 2])

    @property
    def rejected_lengths(self) -> Tensor:
        """Tokens of each rejected response, `[B]`."""
        return self.tokens.new_tensor(self.lengths[len(self.lengths) // 2 :])

    def _sums(self) -> Tensor:
        return torch.stack([tokens.sum() for tokens in self.tokens.split(list(self.lengths))])


def token_logps(
    hidden: Tensor, positions: Tensor, targets: Tensor, head: Head, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Return the log-probability of each target token, `[N]`, in nats and at least float32.

    Token t's is `log_softmax(logits)[target]` with the logits of the hidden state before it.

    Args:
        hidden: `[M, H]`, hidden states of all positions.
        positions: `[N]`, which of them are judged; no position twice.
        targets: `[N]`, the token that follows each of them.
        head: The projection on the vocabulary.
        chunk_bytes: The most memory that the logits of one chunk may take, in bytes.
    """
    apply: Callable[..., Tensor] = _TokenLogps.apply
    return apply(hidden, positions, targets, head.weight, head.bias, head.scale, head.softcap, chunk_bytes)


class _TokenLogps(torch.autograd.Function):
    """The chunked projection. With p the softmax of the logits z, d logp / d z = onehot(target) − p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        positions: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunk_bytes: int,
    ) -> Tensor:
        """Compute the log-probabilities chunk by chunk, keeping no logits."""
        # Decided here because autocast is off again when the backward pass runs.
        compute = _compute_dtype(hidden)
        logps = []
        for rows in _chunks(len(positions), weight, chunk_bytes):
            logits, _ = _logits(hidden[positions[rows]], weight, bias, scale, softcap, compute)
            chosen = logits.gather(-1, targets[rows, None]).squeeze(-1)
            logps.append(chosen - logits.logsumexp(-1))
        ctx.save_for_backward(hidden, positions, targets, weight, bias)
        ctx.settings = scale, softcap, chunk_bytes, compute
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each chunk's logits again, and from them the gradients of hidden states, weight and bias."""
        (grad_logps,) = gradients
        hidden, positions, targets, weight, bias = ctx.saved_tensors
        scale, softcap, chunk_bytes, compute = ctx.settings
        wants_weight = ctx.needs_input_grad[3]
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[4] else None
        for rows in _chunks(len(positions), weight, chunk_bytes):
            states = hidden[positions[rows]]
            logits, slope = _logits(states, weight, bias, scale, softcap, compute)
            grad = logits.softmax(-1).neg_()
            grad[torch.arange(len(grad), device=grad.device), targets[rows]] += 1
            grad *= grad_logps[rows, None]
            if slope is not None:
                grad *= slope
            grad *= scale
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(compute)
            grad_hidden[positions[rows]] = (grad @ weight.to(compute)).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.T @ states.to(compute)).to(weight.dtype)
        return grad_hidden, None, None, grad_weight, grad_bias, None, None, None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return what autocast would multiply in here, or the hidden states' own type."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return one chunk's logits, `[n, V]`, and the soft cap's slope at them where there is a soft cap."""
    with torch.autocast(states.device.type, enabled=False):
        product = states.to(compute) @ weight.to(compute).T
    logits = product.to(torch.promote_types(compute, torch.float32))
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, None
    capped = torch.tanh(logits / softcap)
    return capped * softcap, 1 - capped.square()


def _chunks(num_rows: int, weight: Tensor, chunk_bytes: int) -> list[slice]:
    """Cut the judged positions so that one chunk's float32 logits fit into `chunk_bytes`."""
    size = max(1, chunk_bytes // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
