"""Steps with pairs of one source alone are known from the plan, and shuffled pairs are never called so."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_cli.evaluation.findings.plan_checks import dominated

NAMES = ["first", "second", "third"]


def test_sources_one_after_the_other_are_found_with_their_steps():
    sources = np.repeat([2, 0, 1], [40, 320, 320])
    found = dominated(sources, NAMES, pairs_per_step=16, steps_of_window=4, num_steps=100)
    # Of the first window, 40 pairs are of the third source.
    assert (found.source, found.first_step, found.last_step) == ("first", 5, 20)
    assert found.of_data == pytest.approx(320 / 680)
    assert 0.9 <= found.share <= 1.0
    # A run that ends before has none.
    assert dominated(sources, NAMES, 16, 4, num_steps=4) is None


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.05, 0.95), (0.3, 0.7), (1.0,), (0.34, 0.33, 0.33)])
def test_shuffled_pairs_are_not(shares):
    """In 2,000 windows; a source that has most of the data has most of every step."""
    generator = np.random.default_rng(0)
    sources = generator.choice(len(shares), 128_000, p=shares)
    assert dominated(sources, NAMES, pairs_per_step=16, steps_of_window=4, num_steps=10_000) is None


def test_less_data_than_a_window_is_not():
    assert dominated(np.array([0, 0, 1]), NAMES, 16, 4, 10) is None
