"""What the diagnosis knows of a run beside its rows: settings and sizes, in the run's `facts.json`."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dpo_cli.preference.losses import Loss
from dpo_cli.preference.objective import Objective
from dpo_cli.settings import Settings

_LEAST_PAIRS, _LEAST_STEPS = 64, 4


class Domination(Settings):
    """Neighbouring steps whose pairs are almost all of one source, though the data has others."""

    source: str
    """The source."""
    first_step: int
    """The first of these steps."""
    last_step: int
    """The last one."""
    share: float
    """The source's share of their pairs."""
    of_data: float
    """Its share of all training pairs."""


class RunFacts(Settings):
    """A run's settings and sizes, as far as its diagnosis needs them."""

    losses: tuple[Loss, ...]
    """What it minimises."""
    trained: Literal["all weights", "an adapter"]
    """What is trained."""
    learning_rate: float
    """The highest learning rate."""
    warmup_steps: int
    """Steps until the learning rate is there."""
    num_steps: int = Field(ge=1)
    """Planned steps."""
    steps_per_epoch: int = Field(ge=1)
    """Steps of a pass over the data."""
    pairs_per_step: int = Field(ge=1)
    """Pairs of a step, over all processes; at most those of an epoch."""
    from_reference: bool
    """Whether training starts from its reference, and that stays as it is: rewards say how far the policy moved."""
    chosen_tokens: float
    """Scored tokens of a chosen response, as a mean over the training pairs."""
    rejected_tokens: float
    """Tokens of a rejected response, likewise."""
    max_steps: int | None = None
    """Where the configuration stops training earlier; null: after the last epoch."""
    max_grad_norm: float | None = None
    """To which larger gradients are scaled down; null: they are not."""
    best_by: str | None = None
    """By which held-out figure the trained model is chosen; null: it is that of the last step."""
    dominated: Domination | None = None
    """Steps that have pairs of one source alone, by the step plan."""

    @classmethod
    def read(cls, file: Path) -> RunFacts | None:
        """Read a run's `facts.json`; None where there is none that can be read."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError):
            return None

    @functools.cached_property
    def objective(self) -> Objective:
        """The losses as one."""
        return Objective(self.losses)

    @property
    def num_pairs(self) -> int:
        """About how many training pairs there are."""
        return self.steps_per_epoch * self.pairs_per_step

    @functools.cached_property
    def window(self) -> int:
        """How many steps are looked at together: so many that they have 64 pairs, at least 4.

        A share of 64 pairs is known to ±12 points, a mean to an eighth of the spread of its values.
        """
        return max(_LEAST_STEPS, math.ceil(_LEAST_PAIRS / self.pairs_per_step))
