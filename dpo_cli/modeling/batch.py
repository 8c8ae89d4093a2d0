"""Pairs become one forward pass: a layout says where their tokens stand and which positions are judged.

A layout is a function from tokenized pairs to a `PairBatch`; `LAYOUTS` at the end of this file lists them.
All of them name the same response tokens in the same order (every pair's chosen response, then every
pair's rejected one), so that nothing behind the batch knows which layout ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.records import TokenizedPair


@dataclass(frozen=True)
class PairBatch:
    """B pairs as the model gets them, with N response tokens to judge.

    Attributes:
        pairs: The pairs' indices in the data, `B` of them.
        input_ids: `[R, T]`.
        attention_mask: `[R, T]`, 1 where a token stands, 0 where there is padding.
        positions: `[N]`, into the `R·T` hidden states: the one that predicts each response token. No
            position occurs twice.
        targets: `[N]`, the response tokens.
        lengths: Response tokens of each sequence, `2B` of them: the chosen ones, then the rejected ones.
        num_tokens: Tokens without padding.
    """

    pairs: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    num_tokens: int

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch with its tensors on a device."""
        return PairBatch(
            self.pairs,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.lengths,
            self.num_tokens,
        )


Layout = Callable[[Sequence[int], Sequence[TokenizedPair]], PairBatch]


def padded(indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Stack chosen and rejected sequences as `2B` rows, padded on the right, the prompt in each.

    Args:
        indices: The pairs' indices in the data.
        pairs: The pairs themselves, `B` of them.
    """
    sequences = [(pair.prompt, pair.chosen) for pair in pairs]
    sequences += [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = np.zeros((len(sequences), width), np.int64)
    attention_mask = np.zeros_like(input_ids)
    positions, targets = [], []
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = response
        attention_mask[row, :end] = 1
        # A hidden state predicts the token after it.
        positions.append(row * width + np.arange(len(prompt) - 1, end - 1))
        targets.append(response)
    return PairBatch(
        pairs=tuple(indices),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        lengths=tuple(len(response) for _, response in sequences),
        num_tokens=int(attention_mask.sum()),
    )


LAYOUTS: dict[str, Layout] = {
    "padded": padded,
}
