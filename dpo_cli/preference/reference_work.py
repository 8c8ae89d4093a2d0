"""What a reference strategy can use: a model to ask, a model of its own, the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches, PairBatch
from dpo_cli.modeling.folders.model_files import NO_TRUST, Trust
from dpo_cli.modeling.held import FLOAT32, Held
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.preference.cache import ReferenceCache, reference_identity

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class ReferenceWork:
    """The pairs that a reference has to score, and what it may use.

    Attributes:
        model: The reference, placed, and prepared for the layout of the batches.
        policy: What is trained, maybe the same; None: nothing is.
        accelerator: Decides device and precision, and shares the work between ranks.
        needed: Indices of the pairs that will be asked for, ascending.
        batches: Cuts the run's pairs into micro-batches and lays them out.
        progress: Called with pairs done and pairs in all.
        held_out: Indices of the pairs that evaluations will ask for, ascending.
    """

    model: Policy
    policy: Policy | None
    accelerator: Accelerator
    needed: NDArray[np.int64]
    batches: Batches
    progress: Callable[[int, int], None]
    held_out: NDArray[np.int64] | None = None

    def own_model(self) -> Policy:
        """Return the reference as a model of its own that takes no gradient."""
        if self.model is not self.policy:
            return self.model.frozen()
        copied = self.model.frozen_copy()
        copied.place(self.accelerator, trained=False)
        return copied

    def scorer(self, model: Policy) -> BatchScorer:
        """Return a function that scores batches with a model, in the precision of the run and without gradient."""

        def logps(batch: PairBatch) -> Tensor:
            with torch.no_grad():
                result: Tensor = model.scorer(batch, collisions=False)
                return result

        return logps

    def beginning(self) -> BatchScorer:
        """Return a function that scores batches as the reference does now, whatever becomes of the policy."""
        if self.model is not self.policy:
            return self.scorer(self.model.frozen())
        policy, logps = self.model, self.scorer(self.model)
        policy.keep_beginning()

        def at_beginning(batch: PairBatch) -> Tensor:
            with policy.at_beginning():
                return logps(batch)

        return at_beginning

    def cached(self, indices: NDArray[np.int64], scorer: BatchScorer) -> ReferenceCache:
        """Look up what the cache has of some pairs, compute and keep the rest; return the cache."""
        identity = reference_identity(self.model.identity, self.accelerator)
        cache = ReferenceCache(identity, self.batches, self.accelerator)
        cache.complete(indices.tolist(), scorer, self.progress)
        return cache

    def mover(self, model: Policy, alpha: float) -> Callable[[], None]:
        """Return a function that moves a model a share of the way to the policy: θ_ref ← α·θ + (1−α)·θ_ref.

        Raises:
            UserError: Their weights differ in name or shape.
        """
        policy = self.policy
        assert policy is not None, "nothing is trained"
        refuse_other_shapes(model, policy)
        return lambda: model.weights.move_towards(policy.weights, alpha)


def refuse_other_shapes(reference: Policy, policy: Policy) -> None:
    """Refuse a reference that cannot move towards the policy.

    Raises:
        UserError: Their weights differ in name or shape.
    """
    if reference.weights.shapes() != policy.weights.shapes():
        what = "the reference has weights of other names or shapes than the policy, so that it cannot move towards it"
        raise UserError(what, "`reference.model`", "choose a model of the same architecture, or `reference: frozen`")


def reference_model(
    name: str | None, policy: Policy, trust: Trust = NO_TRUST, held: Held = FLOAT32, *, empty: bool = False
) -> Policy:
    """Return the policy itself, or the named model beside it, which is trusted with as much.

    Args:
        name: The model, or None.
        policy: What is trained.
        trust: What the model may bring along.
        held: How its weights are held.
        empty: Whether its weights are left out, as the policy's are.

    Raises:
        UserError: The named model reads another vocabulary.
    """
    if name is None:
        return policy
    model = Policy.empty(name, trust, held=held) if empty else Policy.load(name, trust, policy.model.device, held=held)
    if model.vocabulary != policy.vocabulary:
        what = f"the reference model has a vocabulary of {model.vocabulary}, the policy of {policy.vocabulary}"
        raise UserError(what, f"`reference.model: {name}`", "choose a reference with the same tokenizer")
    return model
