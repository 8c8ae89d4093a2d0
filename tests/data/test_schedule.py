"""The step plan: every pair once an epoch, the same plan for the same seed, ranks that share a step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.schedule import Plan

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def make_plan(lengths, **settings):
    defaults = {
        "pairs_per_step": 4,
        "micro_batch_tokens": 400,
        "epochs": 1,
        "max_steps": None,
        "shuffle": True,
        "seed": 0,
    }
    indices = np.arange(len(lengths)) * 3 + 1
    return Plan(indices=indices, lengths=np.array(lengths), **{**defaults, **settings})


def pairs_of(steps):
    return [i for step in steps for batch in step.micro_batches if not batch.filler for i in batch.pairs]


@given(lengths_lists, st.integers(1, 9), st.integers(1, 500), st.integers(0, 99))
def test_every_pair_stands_exactly_once_in_every_epoch(lengths, pairs_per_step, budget, seed):
    plan = make_plan(lengths, pairs_per_step=pairs_per_step, micro_batch_tokens=budget, epochs=2, seed=seed)
    steps = list(plan.steps())
    half = plan.steps_per_epoch
    for epoch in (steps[:half], steps[half:]):
        assert Counter(pairs_of(epoch)) == Counter(plan.indices.tolist())
    assert all(1 <= step.num_pairs <= pairs_per_step for step in steps)


@given(lengths_lists, st.integers(1, 4), st.integers(1, 9))
def test_ranks_share_each_step_without_overlap_and_none_is_without_work(lengths, num_ranks, pairs_per_step):
    plan = make_plan(lengths, pairs_per_step=pairs_per_step)
    whole = list(plan.steps())
    shares = [list(plan.steps(0, rank, num_ranks)) for rank in range(num_ranks)]
    for number, step in enumerate(whole):
        parts = [share[number] for share in shares]
        assert Counter(pairs_of(parts)) == Counter(step.pairs)
        assert all(part.micro_batches for part in parts)
        assert {part.num_pairs for part in parts} == {step.num_pairs}


@given(lengths_lists, st.integers(1, 600))
def test_a_micro_batch_stays_in_the_budget_unless_one_pair_is_larger(lengths, budget):
    plan = make_plan(lengths, micro_batch_tokens=budget)
    length_of = dict(zip(plan.indices.tolist(), lengths, strict=True))
    for step in plan.steps():
        for batch in step.micro_batches:
            padded = 2 * len(batch.pairs) * max(length_of[i] for i in batch.pairs)
            assert padded <= budget or len(batch.pairs) == 1


@given(lengths_lists, st.integers(0, 30))
def test_to_resume_is_to_skip(lengths, done):
    plan = make_plan(lengths, epochs=3)
    assert list(plan.steps())[done:] == list(plan.steps(after=done))


@pytest.mark.parametrize("settings", [{}, {"max_steps": 3}, {"epochs": 0.3}, {"epochs": 2, "shuffle": False}])
def test_the_pairs_trained_on_are_those_of_the_steps(settings):
    plan = make_plan(list(range(1, 31)), **settings)
    assert plan.trained_on().tolist() == sorted(set(pairs_of(plan.steps())))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another():
    lengths = list(range(1, 41))
    plans = [list(make_plan(lengths, seed=seed).steps()) for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_epochs_have_orders_of_their_own_unless_the_order_is_the_datas():
    lengths = list(range(1, 41))
    shuffled = [step.pairs for step in make_plan(lengths, epochs=2).steps()]
    assert shuffled[:10] != shuffled[10:]
    kept = make_plan(lengths, epochs=2, shuffle=False)
    assert [i for step in kept.steps() for i in step.pairs] == [*kept.indices, *kept.indices]


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 3), (2.5, None, 8), (2, 4, 4), (0.1, None, 1)])
def test_the_number_of_steps(epochs, max_steps, expected):
    plan = make_plan([10] * 10, epochs=epochs, max_steps=max_steps)
    assert plan.num_steps == len(list(plan.steps())) == expected


def test_the_epoch_of_a_step_is_the_share_of_the_data_seen():
    plan = make_plan([10] * 10, epochs=2)
    assert [step.epoch for step in plan.steps()] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])


def test_a_decimal_number_of_epochs_is_taken_as_written():
    """In binary 1.1 is a little more than 1.1, and 1.1 · 50 a little more than 55."""
    assert make_plan([10] * 200, epochs=1.1).num_steps == 55
