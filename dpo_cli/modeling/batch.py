"""Pairs become one forward pass: the tokens as a layout puts them, and which positions are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.data.records import Gaps, TokenizedPair, Tokens
from dpo_cli.modeling.attention.kernels import PIECES, Kernel
from dpo_cli.modeling.attention.trees import TokenTree
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.responses import Predictions, Responses
from dpo_cli.modeling.sending import packed, sent
from dpo_cli.modeling.tree import grow

if TYPE_CHECKING:
    from dpo_cli.data.prepared.folder import PreparedPairs


@dataclass(frozen=True)
class PairBatch:
    """B pairs as the model gets them, with N response tokens to score.

    Attributes:
        pairs: The pairs' indices in the data, `B` of them.
        input_ids: `[R, T]`.
        attention_mask: `[R, T]`, 1 where there is a token, 0 where there is padding; None where a tree says it.
        tree: Which token sees which, where one row holds them all; else None.
        counts: `[R·T]`, in how many of the sequences each token is; 0 where there is padding.
        predictions: Which of the `R·T` hidden states predict the response tokens that are scored.
        targets: `[N]`, the response tokens that are scored.
        weights: `[B]`, float32: what each pair's loss is multiplied by.
        margins: `[B]`, float32: each pair's target margin.
        responses: Which of the scored tokens belong to which of the `2B` responses.
        num_tokens: Tokens of all sequences without padding, each prompt counted with both of its responses: the
            same under every layout.
        reference: `[N]`, the reference's log-probability of each scored token, where it is known before; or None.
    """

    pairs: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor | None
    tree: TokenTree | None
    counts: Tensor
    predictions: Predictions
    targets: Tensor
    weights: Tensor
    margins: Tensor
    responses: Responses
    num_tokens: int
    reference: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """The hidden state that predicts each response token that is scored, `[N]`."""
        return self.predictions.positions

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored response tokens of each sequence, `2B` of them: the chosen ones, then the rejected ones."""
        return self.responses.lengths

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch with its tensors on a device."""
        return sent(self, device)


Prepared = Callable[[], PairBatch]
"""Sends a batch to the device, where it is returned."""


@dataclass(frozen=True)
class Batches:
    """Cuts pairs into micro-batches and makes a micro-batch into tensors on the device.

    Attributes:
        pairs: All pairs of the run.
        layout: How they are laid out.
        micro_batch_tokens: The most tokens of one forward pass; a pair that alone has more is one by itself.
        device: Where the model is.
        known: Returns what is known of some pairs' `PairBatch.reference`, on the CPU; or None.
        source: What prepares micro-batches; None: they are when they are asked for.
    """

    pairs: PreparedPairs
    layout: Layout
    micro_batch_tokens: int
    device: torch.device
    known: Callable[[Sequence[int]], NDArray[np.float32]] | None = None
    source: Callable[[MicroBatch], Prepared] | None = None

    def cut(self, indices: Sequence[int]) -> list[MicroBatch]:
        """Cut some pairs, each in one micro-batch."""
        cuts = self.layout.cut(self.pairs.sizes, indices, self.micro_batch_tokens)
        return [MicroBatch(tuple(cut)) for cut in cuts]

    def __call__(self, micro_batch: MicroBatch) -> PairBatch:
        """Return the pairs laid out, on the device; no token of a filler counts."""
        return (self.source or self.prepare)(micro_batch)()

    def prepare(self, micro_batch: MicroBatch) -> Prepared:
        """Read the pairs, lay them out and pack them for the device, of which nothing is asked."""
        pairs = [self.pairs[index] for index in micro_batch.pairs]
        batch = self.layout.batch(micro_batch.pairs, pairs)
        if micro_batch.filler:
            batch = dataclasses.replace(batch, counts=torch.zeros_like(batch.counts))
        if self.known:
            batch = dataclasses.replace(batch, reference=torch.from_numpy(self.known(micro_batch.pairs)))
        return packed(batch, self.device)


def padded_batch(indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Lay out B pairs, a row for each sequence, padded on the right."""
    sequences = _sequences_of(pairs)
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), np.int64)
    attention_mask = np.zeros_like(input_ids)
    places = []
    for row, (prompt, response) in enumerate(sequences):
        size = len(prompt) + len(response)
        input_ids[row, :size] = np.concatenate([prompt, response])
        attention_mask[row, :size] = 1
        places.append(row * width + np.arange(size))
    mask = torch.from_numpy(attention_mask)
    return _as_batch(indices, pairs, torch.from_numpy(input_ids), mask, None, places)


def packed_batch(
    indices: Sequence[int],
    pairs: Sequence[TokenizedPair],
    kernel: Kernel = PIECES,
    windows: Sequence[int | None] = (None,),
) -> PairBatch:
    """Lay out B pairs as one row, in which what sequences begin with in common is written once.

    Args:
        indices: The pairs' indices in the data.
        pairs: The pairs themselves.
        kernel: What computes attention over the row.
        windows: Those of the model's layers.
    """
    tree = TokenTree.of(grow([np.concatenate(sequence) for sequence in _sequences_of(pairs)]), kernel, windows)
    return _as_batch(indices, pairs, torch.from_numpy(tree.grown.tokens)[None], None, tree, tree.grown.places)


def _sequences_of(pairs: Sequence[TokenizedPair]) -> list[tuple[Tokens, Tokens]]:
    """Return prompt and response of all chosen, then of all rejected sequences."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def _as_batch(
    indices: Sequence[int],
    pairs: Sequence[TokenizedPair],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tree: TokenTree | None,
    places: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]],
) -> PairBatch:
    """Name the response tokens; `places` says where each sequence's tokens are among the hidden states."""
    sequences = _sequences_of(pairs)
    scored = [scored_tokens(len(pair.chosen), pair.chosen_gaps) for pair in pairs]
    scored += [scored_tokens(len(pair.rejected), pair.rejected_gaps) for pair in pairs]
    positions, targets = [], []
    for (prompt, response), place, which in zip(sequences, places, scored, strict=True):
        # A hidden state predicts the token after it.
        positions.append(place[len(prompt) - 1 : -1][which])
        targets.append(response[which])
    return PairBatch(
        pairs=tuple(indices),
        input_ids=input_ids,
        attention_mask=attention_mask,
        tree=tree,
        counts=torch.from_numpy(np.bincount(np.concatenate(places), minlength=input_ids.numel())),
        predictions=Predictions.of(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        responses=Responses.of(list(map(len, targets))),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
    )


def scored_tokens(length: int, gaps: Gaps | None) -> slice | np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which tokens of a response are scored: all, or those outside its gaps."""
    if gaps is None:
        return slice(None)
    scored = np.ones(length, np.bool_)
    for start, stop in gaps.reshape(-1, 2).tolist():
        scored[start:stop] = False
    return scored
