"""Where the reference log-probabilities come from; `Reference` at the end lists the ways.

The reference is the policy as it stands when `open` is called, which is before step 1 in every run, resumed
ones included; or another model, named by `reference.model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dpo_cli.errors import UserError
from dpo_cli.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from dpo_cli.modeling.batch import Batches, PairBatch

ReferenceLogps = Callable[["PairBatch"], "Tensor"]
"""Answers with the log-probability of each response token of a batch, `[N]`, in nats, without gradient."""


@dataclass(frozen=True)
class ReferenceWork:
    """What a reference has to answer for, and what it may use.

    Attributes:
        model: The reference, prepared for the layout of the batches.
        trained: Whether it is the policy itself, which is going to move.
        accelerator: Decides device and precision, and shares the work between ranks.
        needed: Indices of the pairs that will be asked for, ascending.
        batches: Cuts the run's pairs into micro-batches and lays them out.
        progress: Called with pairs done and pairs in all.
    """

    model: PreTrainedModel
    trained: bool
    accelerator: Accelerator
    needed: NDArray[np.int64]
    batches: Batches
    progress: Callable[[int, int], None]


class Cached(Settings):
    """Compute the reference once, before step 1, and keep it on disk: no second model while training."""

    type: Literal["cached"] = "cached"
    """Where the reference log-probabilities come from."""
    model: str | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    def open(self, work: ReferenceWork) -> ReferenceLogps:
        """Look up what the cache has of the pairs, compute and keep the rest."""
        from dpo_cli.preference.cache import ReferenceCache, reference_identity

        cache = ReferenceCache(reference_identity(work.model, work.accelerator))
        cache.complete(work, _scoring(work.model, work.accelerator))
        return cache.lookup(work.batches.pairs, work.accelerator.device)


class Frozen(Settings):
    """Hold a frozen model beside the policy and ask it for every batch."""

    type: Literal["frozen"] = "frozen"
    """Where the reference log-probabilities come from."""
    model: str | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    def open(self, work: ReferenceWork) -> ReferenceLogps:
        """Clone the policy, or take the other model."""
        model = copy.deepcopy(work.model) if work.trained else work.model
        return _scoring(model.requires_grad_(False), work.accelerator)


def reference_model(name: str | None, policy: PreTrainedModel) -> PreTrainedModel:
    """Return the policy itself, or the named model beside it.

    Raises:
        UserError: The named model reads another vocabulary.
    """
    if name is None:
        return policy
    from dpo_cli.modeling.loading import load_policy

    model = load_policy(name)
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (policy, model))
    if ours != theirs:
        what = f"the reference model has a vocabulary of {theirs}, the policy of {ours}"
        raise UserError(what, f"`reference.model: {name}`", "choose a reference with the same tokenizer")
    return model.to(policy.device)


def _scoring(model: PreTrainedModel, accelerator: Accelerator) -> ReferenceLogps:
    """Return the function that asks a model, on the device and in the precision of the policy."""
    import torch

    from dpo_cli.modeling.scorer import Scorer

    scorer = Scorer(model)

    def logps(batch: PairBatch) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            result: Tensor = scorer(batch)
            return result

    return logps


Reference = Annotated[Cached | Frozen, Field(discriminator="type")]
"""The closed union of all reference strategies, told apart by `type`."""
