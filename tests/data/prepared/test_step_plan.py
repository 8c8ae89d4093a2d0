"""The step plan: every pair once an epoch, the same plan for the same seed, ranks that share a step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.prepared.step_plan import MicroBatch, PairSizes, Plan, largest
from dpo_cli.modeling.layouts import PACKED, PADDED

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def sizes_of(lengths, prompt_ids=None, opening=0):
    """Pairs whose longer sequences have these lengths; a third of each is prompt, the rejected response is short."""
    lengths = np.array(lengths)
    prompts = lengths // 3
    ids = np.arange(len(lengths)) if prompt_ids is None else np.array(prompt_ids)
    responses = lengths - prompts
    return PairSizes(prompts, responses, np.minimum(2, responses), responses, ids, opening)


def make_plan(lengths, **settings):
    defaults = {"pairs_per_step": 4, "epochs": 1, "max_steps": None, "shuffle": True, "seed": 0}
    # Every other pair of the data is left out, so that places and indices are not the same.
    indices = np.arange(len(lengths)) * 2 + 1
    return Plan(indices=indices, lengths=np.repeat(lengths, 2), **{**defaults, **settings})


def cutter(lengths, budget=400):
    sizes = sizes_of(lengths)
    return lambda indices: [MicroBatch(tuple(cut)) for cut in PADDED.cut(sizes, indices, budget)]


def steps_of(plan, *arguments, budget=400):
    return list(plan.steps(cutter(plan.lengths, budget), *arguments))


def pairs_of(steps):
    return [i for step in steps for batch in step.micro_batches if not batch.filler for i in batch.pairs]


@given(lengths_lists, st.integers(1, 9), st.integers(1, 500), st.integers(0, 99))
def test_every_pair_stands_exactly_once_in_every_epoch(lengths, pairs_per_step, budget, seed):
    plan = make_plan(lengths, pairs_per_step=pairs_per_step, epochs=2, seed=seed)
    steps = steps_of(plan, budget=budget)
    half = plan.steps_per_epoch
    for epoch in (steps[:half], steps[half:]):
        assert Counter(pairs_of(epoch)) == Counter(plan.indices.tolist())
    assert all(1 <= step.num_pairs <= pairs_per_step for step in steps)


@given(lengths_lists, st.integers(1, 8), st.integers(1, 19), st.integers(1, 900))
def test_ranks_share_each_step_without_overlap_and_none_is_without_work(lengths, num_ranks, pairs_per_step, budget):
    plan = make_plan(lengths, pairs_per_step=pairs_per_step)
    whole = steps_of(plan, budget=budget)
    shares = [steps_of(plan, 0, rank, num_ranks, budget=budget) for rank in range(num_ranks)]
    for number, step in enumerate(whole):
        parts = [share[number] for share in shares]
        assert Counter(pairs_of(parts)) == Counter(step.pairs)
        assert all(part.micro_batches for part in parts)
        # None makes more forward passes than another: one may need all ranks.
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert {part.num_pairs for part in parts} == {step.num_pairs}
        # What a filler computes counts on another rank, so that it cannot spoil a step that is sound.
        fillers = {cut.pairs for part in parts for cut in part.micro_batches if cut.filler}
        assert all(len(pairs) == 1 and set(pairs) <= set(step.pairs) for pairs in fillers)


@given(lengths_lists, st.integers(1, 600))
def test_a_padded_micro_batch_stays_in_the_budget_unless_one_pair_is_larger(lengths, budget):
    cuts = PADDED.cut(sizes_of(lengths), range(len(lengths)), budget)
    assert sorted(i for cut in cuts for i in cut) == list(range(len(lengths)))
    for cut in cuts:
        assert 2 * len(cut) * max(lengths[i] for i in cut) <= budget or len(cut) == 1


def packed_tokens(sizes, pairs):
    """Tokens of a micro-batch in which every distinct prompt stands once, and how all begin as well."""
    prompts = {int(sizes.prompt_ids[i]): int(sizes.prompts[i]) - sizes.opening for i in pairs}
    return sizes.opening + sum(prompts.values()) + sum(int(sizes.chosen[i] + sizes.rejected[i]) for i in pairs)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 600), st.integers(0, 10))
def test_a_packed_micro_batch_stays_in_the_budget_with_each_prompt_counted_once(prompt_ids, budget, opening):
    sizes = sizes_of([30 + 12 * i for i in prompt_ids], prompt_ids, opening)
    cuts = PACKED.cut(sizes, range(len(prompt_ids)), budget)
    assert sorted(i for cut in cuts for i in cut) == list(range(len(prompt_ids)))
    for cut in cuts:
        assert packed_tokens(sizes, cut) <= budget or len(cut) == 1


def test_pairs_of_one_prompt_go_together_and_cuts_are_even():
    sizes = sizes_of([90] * 12, [0, 1, 2] * 4)
    cuts = PACKED.cut(sizes, range(12), 300)
    assert [{int(sizes.prompt_ids[i]) for i in cut} for cut in cuts] == [{0}, {1}, {2}]
    alone = sizes_of([90] * 9)
    assert [len(cut) for cut in PACKED.cut(alone, range(9), 92 * 7)] == [5, 4]


@given(lengths_lists, st.integers(0, 30))
def test_to_resume_is_to_skip(lengths, done):
    plan = make_plan(lengths, epochs=3)
    assert steps_of(plan)[done:] == steps_of(plan, done)


@pytest.mark.parametrize("settings", [{}, {"max_steps": 3}, {"epochs": 0.3}, {"epochs": 2, "shuffle": False}])
def test_the_pairs_trained_on_are_those_of_the_steps(settings):
    plan = make_plan(list(range(1, 31)), **settings)
    assert plan.trained_on().tolist() == sorted(set(pairs_of(steps_of(plan))))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another():
    lengths = list(range(1, 41))
    plans = [steps_of(make_plan(lengths, seed=seed)) for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_epochs_have_orders_of_their_own_unless_the_order_is_the_datas():
    lengths = list(range(1, 41))
    shuffled = [step.pairs for step in steps_of(make_plan(lengths, epochs=2))]
    assert shuffled[:10] != shuffled[10:]
    kept = make_plan(lengths, epochs=2, shuffle=False)
    assert [i for step in steps_of(kept) for i in step.pairs] == [*kept.indices, *kept.indices]


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(1, None, 3), (2.5, None, 8), (2, 4, 4), (0.1, None, 1)])
def test_the_number_of_steps(epochs, max_steps, expected):
    plan = make_plan([10] * 10, epochs=epochs, max_steps=max_steps)
    assert plan.num_steps == len(steps_of(plan)) == expected


def test_the_epoch_of_a_step_is_the_share_of_the_data_seen():
    plan = make_plan([10] * 10, epochs=2)
    assert [step.epoch for step in steps_of(plan)] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])


def test_a_decimal_number_of_epochs_is_taken_as_written():
    """In binary 1.1 is a little more than 1.1, and 1.1 · 50 a little more than 55."""
    assert make_plan([10] * 200, epochs=1.1).num_steps == 55


def test_what_may_take_most_memory_is_the_longest_row_or_that_of_the_most_sequences():
    """Two pairs of 500 tokens; twenty of 300 that have a prompt of 280 in common; and a small one."""
    prompts, responses = np.array([400, 400, *[280] * 20, 10]), np.array([50, 50, *[10] * 20, 5])
    sizes = PairSizes(prompts, responses, responses, responses, np.array([0, 1, *[2] * 20, 3]))
    cuts = [MicroBatch((0, 1)), MicroBatch(tuple(range(2, 22))), MicroBatch((22,))]
    assert packed_tokens(sizes, cuts[0].pairs) > packed_tokens(sizes, cuts[1].pairs)
    assert largest(sizes, cuts, packed_tokens) == {cuts[0], cuts[1]}
    assert largest(sizes, cuts[1:], packed_tokens) == {cuts[1]}
