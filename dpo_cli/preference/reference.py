"""Where the reference log-probabilities come from; `Reference` at the end lists the ways.

The reference is the policy as it is when `open` is called, which is before step 1 in every run, resumed ones included;
or another model, named by `reference.model`. One that moves is saved with every checkpoint.

The classes are settings, and are read before torch is needed: what computes is in `ReferenceWork`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dpo_cli.settings import PathText, Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from dpo_cli.modeling.batch import Batches, PairBatch
    from dpo_cli.modeling.policy import Policy
    from dpo_cli.modeling.scorer import BatchScorer
    from dpo_cli.preference.reference_work import ReferenceWork


@dataclass(frozen=True)
class OpenReference:
    """A reference that can be asked.

    Attributes:
        logps: Scores batches, without gradient.
        moving: The reference where it is going to move, to be saved and restored, or None.
        after_step: To be called with the number of every step that was taken.
        beginning: Scores held-out pairs as the reference did before step 1, where it moves; or None.
        known: Returns what `logps` does, of some pairs and on the CPU, where that was computed before; or None.
    """

    logps: BatchScorer
    moving: Policy | None = None
    after_step: Callable[[int], None] = lambda step: None
    beginning: BatchScorer | None = None
    known: Callable[[Sequence[int]], NDArray[np.float32]] | None = None

    def __call__(self, batch: PairBatch) -> Tensor:
        """Return the log-probability of each response token of a batch, `[N]`, in nats, without gradient."""
        return self.logps(batch)

    def beside(self, batches: Batches) -> Batches:
        """Return batches that bring along what is known, so that the device does not have to wait for it."""
        return dataclasses.replace(batches, known=self.known)


class Cached(Settings):
    """Compute the reference once, before step 1, and keep it on disk: no second model while training."""

    type: Literal["cached"] = "cached"
    """Where the reference log-probabilities come from."""
    model: PathText | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    holds_model: ClassVar[bool] = False

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return for how many pairs log-probabilities are computed before step 1, of those needed and held out."""
        return needed

    def open(self, work: ReferenceWork) -> OpenReference:
        """Look up what the cache has of the pairs, compute and keep the rest."""
        cache = work.cached(work.needed, work.scorer(work.model))
        return OpenReference(cache.lookup, known=cache.values)


class Frozen(Settings):
    """Keep a frozen model beside the policy and score every batch with it."""

    type: Literal["frozen"] = "frozen"
    """Where the reference log-probabilities come from."""
    model: PathText | None = None
    """The reference model: a folder, a .gguf file or a Hub id; null: the policy before step 1."""

    holds_model: ClassVar[bool] = True

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return 0: it is asked for every batch."""
        return 0

    def open(self, work: ReferenceWork) -> OpenReference:
        """Keep how the policy answers now, or take the other model."""
        return OpenReference(work.beginning())


class Synced(Settings):
    """Keep a model beside the policy that moves part of the way to it at intervals (TR-DPO).

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
    """α: the part of the way to the policy that it moves; 1: it becomes the policy."""

    holds_model: ClassVar[bool] = True

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return how many pairs are held out: evaluations compare with what it was before step 1."""
        return held_out

    def open(self, work: ReferenceWork) -> OpenReference:
        """Clone the policy, or take the other model, and let it follow."""
        model = work.own_model()
        scorer = work.scorer(model)
        if work.policy is None:
            return OpenReference(scorer)
        move = work.mover(model, self.alpha)
        beginning = None
        if work.held_out is not None and len(work.held_out):
            beginning = work.cached(work.held_out, scorer).lookup

        def after_step(step: int) -> None:
            if step % self.every_steps == 0:
                move()

        return OpenReference(scorer, model, after_step, beginning)


class NoReference(Settings):
    """Use no reference, for losses that need none: every log π_ref is 0."""

    type: Literal["none"] = "none"
    """Where the reference log-probabilities come from."""

    model: ClassVar[None] = None
    holds_model: ClassVar[bool] = False

    def num_asked(self, needed: int, held_out: int) -> int:
        """Return 0: there is none."""
        return 0

    def open(self, work: ReferenceWork | None = None) -> OpenReference:
        """Return zeros for every batch."""
        return OpenReference(lambda batch: batch.weights.new_zeros(len(batch.targets)))


Reference = Annotated[Cached | Frozen | Synced | NoReference, Field(discriminator="type")]
"""The closed union of all reference strategies, discriminated by `type`."""
