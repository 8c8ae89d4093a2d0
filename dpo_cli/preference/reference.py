"""Where the reference log-probabilities come from; `Reference` at the end lists the ways.

The reference is the policy as it stands when `open` is called, which is before step 1 in every run, resumed
ones included; or another model, named by `reference.model`. One that moves is saved with every checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo_cli.errors import UserError
from dpo_cli.modeling.model_files import NO_TRUST, Trust
from dpo_cli.settings import PathText, Settings

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
class OpenReference:
    """A reference at work.

    Attributes:
        logps: Answers with log-probabilities.
        moving: The model that is going to move, to be saved and restored, or None.
        after_step: To be called with the number of every step that was taken.
        beginning: Answers for held-out pairs as the reference did before step 1, where it moves; or None.
    """

    logps: ReferenceLogps
    moving: PreTrainedModel | None = None
    after_step: Callable[[int], None] = lambda step: None
    beginning: ReferenceLogps | None = None

    def __call__(self, batch: PairBatch) -> Tensor:
        """Return the log-probability of each response token of a batch, `[N]`, in nats, without gradient."""
        return self.logps(batch)


@dataclass(frozen=True)
class ReferenceWork:
    """What a reference has to answer for, and what it may use.

    Attributes:
        model: The reference, prepared for the layout of the batches.
        policy: What is trained, maybe the same model; None: nothing is.
        accelerator: Decides device and precision, and shares the work between ranks.
        needed: Indices of the pairs that will be asked for, ascending.
        batches: Cuts the run's pairs into micro-batches and lays them out.
        progress: Called with pairs done and pairs in all.
        held_out: Indices of the pairs that evaluations will ask for, ascending.
        digest: What `weights_digest` says of `model`, where that is known already.
    """

    model: PreTrainedModel
    policy: PreTrainedModel | None
    accelerator: Accelerator
    needed: NDArray[np.int64]
    batches: Batches
    progress: Callable[[int, int], None]
    held_out: NDArray[np.int64] | None = None
    digest: str | None = None


class Cached(Settings):
    """Compute the reference once, before step 1, and keep it on disk: no second model while training."""

    type: Literal["cached"] = "cached"
    """Where the reference log-probabilities come from."""
    model: PathText | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    holds_model: ClassVar[bool] = False

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return of how many pairs log-probabilities are computed before step 1, of those needed and held out."""
        return needed

    def open(self, work: ReferenceWork) -> OpenReference:
        """Look up what the cache has of the pairs, compute and keep the rest."""
        return OpenReference(_from_cache(work, _scoring(work.model, work.accelerator)))


class Frozen(Settings):
    """Hold a frozen model beside the policy and ask it for every batch."""

    type: Literal["frozen"] = "frozen"
    """Where the reference log-probabilities come from."""
    model: PathText | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    holds_model: ClassVar[bool] = True

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return 0: it is asked for every batch."""
        return 0

    def open(self, work: ReferenceWork) -> OpenReference:
        """Clone the policy, or take the other model."""
        return OpenReference(_scoring(_beside(work), work.accelerator))


class Synced(Settings):
    """Hold a model beside the policy that follows it: every so many steps it moves a share of the way (TR-DPO).

    Evaluations compare with it as it was before step 1, so that they can be compared with each other.

    Source: Gorbatovski et al. 2024, arXiv 2404.09656; α = 1 is their hard update.
    """

    type: Literal["synced"] = "synced"
    """Where the reference log-probabilities come from."""
    model: PathText | None = None
    """The reference model before step 1: a folder, a .gguf file or a Hub id; null: the policy."""
    every_steps: int = Field(512, ge=1)
    """Optimizer steps between two moves."""
    alpha: float = Field(0.6, gt=0, le=1)
    """α: the share of the way to the policy that it moves; 1: it becomes the policy."""

    holds_model: ClassVar[bool] = True

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return how many pairs are held out: evaluations compare with what it was before step 1."""
        return held_out

    def open(self, work: ReferenceWork) -> OpenReference:
        """Clone the policy, or take the other model, and let it follow."""
        import torch

        model, policy = _beside(work), work.policy
        logps = _scoring(model, work.accelerator)
        if policy is None:
            return OpenReference(logps)
        refuse_other_shapes(model, policy)
        beginning = None
        if work.held_out is not None and len(work.held_out):
            beginning = _from_cache(dataclasses.replace(work, needed=work.held_out), logps)

        @torch.no_grad()
        def after_step(step: int) -> None:
            if step % self.every_steps == 0:
                # θ_ref ← α·θ + (1−α)·θ_ref
                for ours, theirs in zip(model.parameters(), policy.parameters(), strict=True):
                    ours.lerp_(theirs, self.alpha)

        return OpenReference(logps, model, after_step, beginning)


class NoReference(Settings):
    """Compare with nothing, for objectives that have no use for a reference: every log π_ref is 0."""

    type: Literal["none"] = "none"
    """Where the reference log-probabilities come from."""

    model: ClassVar[None] = None
    holds_model: ClassVar[bool] = False

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return 0: there is none."""
        return 0

    def open(self, work: ReferenceWork | None = None) -> OpenReference:
        """Answer with zeros."""
        import torch

        return OpenReference(lambda batch: torch.zeros(len(batch.targets), device=batch.targets.device))


def refuse_other_shapes(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Refuse a reference that cannot move towards the policy.

    Raises:
        UserError: Their weights differ in name or shape.
    """
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (policy, model))
    if ours != theirs:
        what = "the reference has weights of other names or shapes than the policy, and cannot move towards it"
        raise UserError(what, "`reference.model`", "choose a model of the same architecture, or `reference: frozen`")


def _beside(work: ReferenceWork) -> PreTrainedModel:
    """Return the reference as a model of its own that takes no gradient."""
    model: PreTrainedModel = copy.deepcopy(work.model) if work.model is work.policy else work.model
    model.requires_grad_(False)
    return model


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
    from dpo_cli.modeling.loading import empty_policy, load_policy

    model = (empty_policy if empty else load_policy)(name, trust)
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (policy, model))
    if ours != theirs:
        what = f"the reference model has a vocabulary of {theirs}, the policy of {ours}"
        raise UserError(what, f"`reference.model: {name}`", "choose a reference with the same tokenizer")
    return model.to(policy.device)


def _from_cache(work: ReferenceWork, score: ReferenceLogps) -> ReferenceLogps:
    """Look up what the cache has of the needed pairs, compute and keep the rest."""
    from dpo_cli.modeling.loading import weights_digest
    from dpo_cli.preference.cache import ReferenceCache, reference_identity

    cache = ReferenceCache(reference_identity(work.digest or weights_digest(work.model), work.accelerator))
    cache.complete(work, score)
    return cache.lookup(work.batches.pairs, work.accelerator.device)


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


Reference = Annotated[Cached | Frozen | Synced | NoReference, Field(discriminator="type")]
"""The closed union of all reference strategies, told apart by `type`."""
