"""How far a rank is, as it notes it for the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_cli.training.ranks import Progress


@pytest.fixture
def scorer():
    """A model that says, as one that Accelerate prepared, whether its next backward pass exchanges gradients."""
    scorer = nn.Linear(1, 1)
    scorer.require_backward_grad_sync = False
    return scorer


def test_the_pass_at_whose_end_ranks_wait_for_each_other_is_noted(scorer):
    progress, seen = Progress(), []

    def note():
        seen.append((progress.step, progress.passes, progress.in_step, progress.last_pass))

    def steps():
        note()
        with torch.no_grad():
            scorer.require_backward_grad_sync = True
            scorer(torch.ones(1))
            note()
            scorer.require_backward_grad_sync = False
        scorer(torch.ones(1))
        note()
        scorer.require_backward_grad_sync = True
        scorer(torch.ones(1))
        note()
        yield "taken"
        note()

    for _ in progress.following(steps(), done=4, scorer=scorer):
        note()
    assert seen == [(5, 0, True, False), (5, 1, True, False), (5, 2, True, False), (5, 3, True, True),
                    (5, 3, False, True), (6, 3, True, False)]  # fmt: skip


def test_nothing_is_counted_after_the_last_step(scorer):
    progress = Progress()
    assert list(progress.following(iter([1, 2]), done=0, scorer=scorer)) == [1, 2]
    scorer(torch.ones(1))
    assert progress.passes == 0
    assert not progress.in_step
