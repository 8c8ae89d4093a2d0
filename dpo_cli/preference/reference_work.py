"""What a reference strategy can use: a model to ask, a model of its own, the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches, PairBatch
from dpo_cli.modeling.loading import empty_policy, load_policy, weights_digest
from dpo_cli.modeling.model_files import NO_TRUST, Trust
from dpo_cli.modeling.scorer import BatchScorer, Scorer
from dpo_cli.preference.cache import ReferenceCache, reference_identity

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ReferenceWork:
    """The pairs that a reference has to score, and what it may use.

    Attributes:
        model: The reference, prepared for the layout of the batches.
        policy: What is trained, maybe the same model; None: nothing is.
        accelerator: Decides device and precision, and shares the work between ranks.
        needed: Indices of the pairs that will be asked for, ascending.
        batches: Cuts the run's pairs into micro-batches and lays them out.
        progress: Called with pairs done and pairs in all.
        held_out: Indices of the pairs that evaluations will ask for, ascending.
        digest: The `weights_digest` of `model`, where it is known already.
    """

    model: PreTrainedModel
    policy: PreTrainedModel | None
    accelerator: Accelerator
    needed: NDArray[np.int64]
    batches: Batches
    progress: Callable[[int, int], None]
    held_out: NDArray[np.int64] | None = None
    digest: str | None = None

    def own_model(self) -> PreTrainedModel:
        """Return the reference as a model of its own that takes no gradient."""
        model: PreTrainedModel = copy.deepcopy(self.model) if self.model is self.policy else self.model
        model.requires_grad_(False)
        return model

    def scorer(self, model: PreTrainedModel) -> BatchScorer:
        """Return a function that scores batches with a model, in the precision of the policy and without gradient."""
        scorer = Scorer(model)

        def logps(batch: PairBatch) -> Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                result: Tensor = scorer(batch)
                return result

        return logps

    def cached(self, indices: NDArray[np.int64], scorer: BatchScorer) -> BatchScorer:
        """Look up what the cache has of some pairs, compute and keep the rest; return the cache's scorer."""
        identity = reference_identity(self.digest or weights_digest(self.model), self.accelerator)
        cache = ReferenceCache(identity, self.batches, self.accelerator)
        cache.complete(indices.tolist(), scorer, self.progress)
        return cache.lookup

    def mover(self, model: PreTrainedModel, alpha: float) -> Callable[[], None]:
        """Return a function that moves a model a share of the way to the policy: θ_ref ← α·θ + (1−α)·θ_ref.

        Raises:
            UserError: Their weights differ in name or shape.
        """
        policy = self.policy
        assert policy is not None, "nothing is trained"
        refuse_other_shapes(model, policy)

        @torch.no_grad()
        def move() -> None:
            for ours, theirs in zip(model.parameters(), policy.parameters(), strict=True):
                ours.lerp_(theirs, alpha)

        return move


def refuse_other_shapes(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Refuse a reference that cannot move towards the policy.

    Raises:
        UserError: Their weights differ in name or shape.
    """
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (policy, model))
    if ours != theirs:
        what = "the reference has weights of other names or shapes than the policy, and cannot move towards it"
        raise UserError(what, "`reference.model`", "choose a model of the same architecture, or `reference: frozen`")


def reference_model(
    name: str | None, policy: PreTrainedModel, trust: Trust = NO_TRUST, *, empty: bool = False
) -> PreTrainedModel:
    """Return the policy itself, or the named model beside it, which is trusted with as much.

    Args:
        name: The model, or None.
        policy: What is trained.
        trust: What the model may bring along.
        empty: Whether its weights are left out, as the policy's are.

    Raises:
        UserError: The named model reads another vocabulary.
    """
    if name is None:
        return policy
    model = (empty_policy if empty else load_policy)(name, trust)
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (policy, model))
    if ours != theirs:
        what = f"the reference model has a vocabulary of {theirs}, the policy of {ours}"
        raise UserError(what, f"`reference.model: {name}`", "choose a reference with the same tokenizer")
    return model.to(policy.device)
