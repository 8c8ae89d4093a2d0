"""How exact attention over trees and log-probabilities are on a device, against float64 by the plainest formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.modeling.attention.kernels import Kernel
from dpo_cli.modeling.attention.trees import TokenTree
from dpo_cli.modeling.logps import Head, token_logps
from dpo_cli.modeling.responses import Predictions
from dpo_cli.modeling.sending import sent
from dpo_cli.modeling.tree import PrefixTree, grow

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""The largest difference to float64, as a share of the norm, that rounding explains, by precision."""

_HEADS, _KEY_HEADS = 4, 2
_MOST_COMPILED = 200


@dataclass(frozen=True)
class AttentionCase:
    """What attention is asked to do.

    Attributes:
        dtype: The precision, by its name in torch.
        head_size: Numbers of a query.
        window: The most tokens that a token sees, or None.
        softcap: `c` in `c · tanh(scores / c)`, or None.
    """

    dtype: str
    head_size: int
    window: int | None
    softcap: float | None

    def __str__(self) -> str:
        """Name the case in a few words."""
        window = f", window {self.window}" if self.window else ""
        return f"{self.dtype}, heads of {self.head_size}{window}{', soft cap' if self.softcap else ''}"


def attention_cases(dtypes: Sequence[str]) -> list[AttentionCase]:
    """Return all cases of some precisions."""
    return [AttentionCase(*case) for case in itertools.product(dtypes, (64, 128, 256), (None, 100), (None, 20.0))]


def precisions_on(device: torch.device) -> list[str]:
    """Return the precisions that runs on a device compute in."""
    emulates = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return ["float32"] if emulates else ["float32", "bfloat16"]


def random_tree(num_prompts: int = 2, opening: int = 40, prompt: int = 50, response: int = 60) -> PrefixTree:
    """Lay out pairs of random tokens: prompts that begin alike, with two responses each."""
    random = np.random.default_rng(0)

    def tokens(size: int) -> np.ndarray[Any, Any]:
        return random.integers(5, 30_000, size).astype(np.int32)

    shared, sequences = tokens(opening), []
    for number in range(num_prompts):
        asked = np.concatenate([shared, tokens(prompt + 7 * number)])
        sequences += [np.concatenate([asked, tokens(response + 11 * side)]) for side in range(2)]
    return grow(sequences)


def attention_errors(kernel: Kernel, tree: PrefixTree, case: AttentionCase, device: torch.device) -> list[float]:
    """Return how far a kernel is from float64, as shares of the norm: its output, and the gradients of q, k and v.

    Raises:
        CannotPack: The kernel does not do this.
    """
    size, row = len(tree.tokens), TokenTree.of(tree, kernel, [case.window]).to(device)
    dtype, generator = getattr(torch, case.dtype), torch.Generator().manual_seed(case.head_size)
    padding, scaling = (0, 0, 0, len(row.depths) - size), case.head_size**-0.5

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, size, heads, case.head_size, generator=generator).to(dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.nn.functional.pad(part, padding) for part in (q, k, v))
        return row.mask(case.window).attend(q, k, v, scaling, case.softcap)[:, :size]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, seen_in(tree, case.window), scaling, case.softcap)

    inputs, towards = [drawn(heads).transpose(1, 2) for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS)], drawn(_HEADS)
    # Every precision, size and soft cap is compiled for itself: more often than a run, of one model, may.
    with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
        found = _with_gradients(ours, [part.to(device) for part in inputs], towards.to(device))
    wanted = _with_gradients(theirs, [part.double() for part in inputs], towards.double())
    return [_share(one, other) for one, other in zip(found, wanted, strict=True)]


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], towards: Tensor) -> list[Tensor]:
    """Return what a function gives, and the gradients of its inputs for a gradient of the output."""
    leaves = [part.detach().clone().requires_grad_() for part in inputs]
    found = function(*leaves)
    return [found.detach(), *torch.autograd.grad(found, leaves, towards.to(found.dtype))]


def seen_in(tree: PrefixTree, window: int | None) -> Tensor:
    """Return `[T, T]`, whether the token of a row sees that of a column, by the sequences that they are in."""
    size = len(tree.tokens)
    seen = torch.zeros(size, size, dtype=torch.bool)
    for places in map(torch.from_numpy, tree.places):
        near = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        near &= ~near.tril(-window) if window else True
        seen[places[:, None], places] |= near
    return seen


def plain_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Attend by the formula, over the whole square; arguments and result as `tree_attention`'s."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v.repeat_interleave(groups, dim=1)).transpose(1, 2)


def logps_errors(dtype: str, softcap: float | None, chunk_bytes: int, device: torch.device) -> list[float]:
    """Return how far log-probabilities are from float64, as shares of the norm: they, and gradients of states and head.

    Args:
        dtype: The precision of hidden states and head, by its name in torch.
        softcap: `c` in `c · tanh(logits / c)`, or None.
        chunk_bytes: As in `token_logps`.
        device: Where it is computed.
    """
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(150, 96, generator=generator), torch.randn(700, 96, generator=generator) / 5
    # Two tokens follow some positions, as behind a prompt that two responses have in common.
    positions = torch.cat([torch.arange(20, 150), torch.arange(20, 60)])
    targets = torch.randint(0, 700, (len(positions),), generator=generator)
    towards = torch.randn(len(positions), generator=generator)
    inputs = [part.to(getattr(torch, dtype)) for part in (states, weight)]

    predictions = sent(Predictions.of(positions.numpy()), device)

    def ours(states: Tensor, weight: Tensor) -> Tensor:
        return token_logps(states, predictions, targets.to(device), Head(weight, None, 1.0, softcap), chunk_bytes)

    def theirs(states: Tensor, weight: Tensor) -> Tensor:
        logits = states @ weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1)[positions, targets]

    found = _with_gradients(ours, [part.to(device) for part in inputs], towards.to(device))
    wanted = _with_gradients(theirs, [part.double() for part in inputs], towards.double())
    return [_share(one, other) for one, other in zip(found, wanted, strict=True)]


def _share(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference as a share of the norm; NaN where anything is."""
    return float((found.double().cpu() - wanted).norm() / wanted.norm())
