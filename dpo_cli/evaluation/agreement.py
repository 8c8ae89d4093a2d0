"""How far the log-probabilities of two models are from each other, token by token, on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dpo_cli.modeling.logps import SequenceLogps

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_cli.modeling.batch import PairBatch
    from dpo_cli.modeling.scorer import BatchScorer


@dataclass(frozen=True)
class Listener:
    """A scorer that keeps what it answers.

    Attributes:
        scorer: What is asked.
        logps: By pair, the log-probabilities of the scored tokens of both responses, on the CPU; filled in place.
    """

    scorer: BatchScorer
    logps: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, batch: PairBatch) -> Tensor:
        """Return what the scorer answers."""
        answer = self.scorer(batch)
        tokens = SequenceLogps.of(answer, batch.responses).tokens.detach().cpu()
        responses, num_pairs = tokens.split(batch.lengths), len(batch.pairs)
        for pair, chosen, rejected in zip(batch.pairs, responses, responses[num_pairs:], strict=False):
            self.logps[pair] = torch.cat([chosen, rejected])
        return answer


@dataclass(frozen=True)
class Difference:
    """How far two models are from each other, in nats a token.

    Attributes:
        largest: The largest difference of all tokens.
        mean: The mean over them.
    """

    largest: float
    mean: float

    @classmethod
    def between(cls, ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> Difference:
        """Compare what two `Listener`s kept of the pairs that both were asked; what is not finite is infinitely far."""
        apart = torch.cat([ours[pair].double() - theirs[pair].double() for pair in ours if pair in theirs]).abs()
        apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
        return cls(float(apart.max()), float(apart.mean()))

    def __str__(self) -> str:
        """Write both."""
        return f"{self.largest:.1e} at most, {self.mean:.1e} on average"

    def as_dict(self) -> dict[str, Any]:
        """Return both by name."""
        return {"largest": self.largest, "mean": self.mean}
