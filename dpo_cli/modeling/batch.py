"""Pairs become one forward pass: a layout says where their tokens stand and which positions are judged.

A layout cuts a step's pairs into micro-batches under a token budget, and lays a micro-batch out as a `PairBatch`;
`LAYOUTS` at the end of this file lists them. All of them name the same response tokens in the same order (every
pair's chosen response, then every pair's rejected one), so that nothing behind the batch knows which layout ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.prepared.step_plan import MicroBatch, PairSizes, cut_packed, cut_padded, packed_tokens
from dpo_cli.data.records import Gaps, TokenizedPair, Tokens
from dpo_cli.modeling.attention import TokenTree, attend_to_trees
from dpo_cli.modeling.tree import grow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_cli.data.prepared.folder import PreparedPairs


@dataclass(frozen=True)
class PairBatch:
    """B pairs as the model gets them, with N response tokens to judge.

    Attributes:
        pairs: The pairs' indices in the data, `B` of them.
        input_ids: `[R, T]`.
        attention_mask: `[R, T]`, 1 where a token stands, 0 where there is padding; None where a tree says it.
        tree: Which token sees which, where one row holds them all; else None.
        counts: `[R·T]`, in how many of the sequences each token is; 0 where there is padding.
        positions: `[N]`, into the `R·T` hidden states: the one that predicts each response token that is judged.
        targets: `[N]`, the response tokens that are judged.
        weights: `[B]`, float32: what each pair's loss is multiplied by.
        margins: `[B]`, float32: each pair's target margin.
        lengths: Judged response tokens of each sequence, `2B` of them: the chosen ones, then the rejected ones.
        num_tokens: Tokens of all sequences without padding, each prompt counted with both of its responses: the
            same under every layout.
    """

    pairs: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor | None
    tree: TokenTree | None
    counts: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    margins: Tensor
    lengths: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch with its tensors on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), (Tensor, TokenTree))
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Padded:
    """Chosen and rejected sequences as `2B` rows, padded on the right, the prompt in each. Works with every model."""

    name = "padded"

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[MicroBatch]:
        """Cut pairs so that their rows, padding included, stay in the budget."""
        return cut_padded(sizes, indices, micro_batch_tokens)

    def tokens(self, sizes: PairSizes, indices: Sequence[int]) -> int:
        """Return the tokens of a forward pass, padding included."""
        return 2 * len(indices) * int(sizes.longest[list(indices)].max())

    def batch(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Lay out B pairs.

        Args:
            indices: The pairs' indices in the data.
            pairs: The pairs themselves.
        """
        sequences = _sequences(pairs)
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
        return _batch(indices, pairs, torch.from_numpy(input_ids), mask, None, places)


@dataclass(frozen=True)
class Packed:
    """All sequences as one row without padding, in which what they begin with in common stands once."""

    name = "packed"

    def prepare(self, model: PreTrainedModel) -> None:
        """Give the model attention over prefix trees.

        Raises:
            CannotPack: Its architecture takes none.
        """
        attend_to_trees(model)

    def cut(self, sizes: PairSizes, indices: Sequence[int], micro_batch_tokens: int) -> list[MicroBatch]:
        """Cut pairs so that their tokens, a prompt that several have counted once, stay in the budget."""
        return cut_packed(sizes, indices, micro_batch_tokens)

    def tokens(self, sizes: PairSizes, indices: Sequence[int]) -> int:
        """Return the tokens of a forward pass, or a little more."""
        return packed_tokens(sizes, indices)

    def batch(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
        """Lay out B pairs.

        Args:
            indices: The pairs' indices in the data.
            pairs: The pairs themselves.
        """
        tree = grow([np.concatenate(sequence) for sequence in _sequences(pairs)])
        return _batch(indices, pairs, torch.from_numpy(tree.tokens)[None], None, TokenTree.of(tree), tree.places)


Layout = Padded | Packed
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Padded(), Packed())}
"""The closed union of all layouts."""


@dataclass(frozen=True)
class Batches:
    """Cuts pairs into micro-batches and makes a micro-batch into tensors on the device.

    Attributes:
        pairs: All pairs of the run.
        layout: Where their tokens stand.
        micro_batch_tokens: The most tokens of one forward pass; a pair that alone has more is one by itself.
        device: Where the model is.
    """

    pairs: PreparedPairs
    layout: Layout
    micro_batch_tokens: int
    device: torch.device

    def cut(self, indices: Sequence[int]) -> list[MicroBatch]:
        """Cut some pairs, each in one micro-batch."""
        return self.layout.cut(self.pairs.sizes, indices, self.micro_batch_tokens)

    def __call__(self, micro_batch: MicroBatch) -> PairBatch:
        """Read the pairs and lay them out."""
        pairs = [self.pairs[index] for index in micro_batch.pairs]
        return self.layout.batch(micro_batch.pairs, pairs).to(self.device)


def _sequences(pairs: Sequence[TokenizedPair]) -> list[tuple[Tokens, Tokens]]:
    """Return prompt and response of all chosen, then of all rejected sequences."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def _batch(
    indices: Sequence[int],
    pairs: Sequence[TokenizedPair],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tree: TokenTree | None,
    places: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]],
) -> PairBatch:
    """Name the response tokens; `places` says where each sequence's tokens stand among the hidden states."""
    sequences = _sequences(pairs)
    judged = [_judged(len(pair.chosen), pair.chosen_gaps) for pair in pairs]
    judged += [_judged(len(pair.rejected), pair.rejected_gaps) for pair in pairs]
    positions, targets = [], []
    for (prompt, response), place, which in zip(sequences, places, judged, strict=True):
        # A hidden state predicts the token after it.
        positions.append(place[len(prompt) - 1 : -1][which])
        targets.append(response[which])
    return PairBatch(
        pairs=tuple(indices),
        input_ids=input_ids,
        attention_mask=attention_mask,
        tree=tree,
        counts=torch.from_numpy(np.bincount(np.concatenate(places), minlength=input_ids.numel())),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        lengths=tuple(map(len, targets)),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in sequences),
    )


def _judged(length: int, gaps: Gaps | None) -> slice | np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which tokens of a response are judged: all, or those outside its gaps."""
    if gaps is None:
        return slice(None)
    judged = np.ones(length, np.bool_)
    for start, stop in gaps.reshape(-1, 2).tolist():
        judged[start:stop] = False
    return judged
