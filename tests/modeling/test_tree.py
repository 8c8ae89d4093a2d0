"""A prefix tree: every token once, every sequence whole, stretches that see what their tokens see."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.modeling import tree as module
from dpo_cli.modeling.tree import grow, stretches

sequence_lists = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=20), min_size=1, max_size=8)


def arrays(lists):
    return [np.array(sequence, np.int32) for sequence in lists]


@given(sequence_lists)
def test_each_sequence_is_read_back_from_where_its_tokens_stand(lists):
    tree = grow(arrays(lists))
    for sequence, place in zip(lists, tree.places, strict=True):
        assert tree.tokens[place].tolist() == sequence
        assert tree.depths[place].tolist() == list(range(len(sequence)))
        assert (np.diff(place) > 0).all()


@given(sequence_lists)
def test_no_token_stands_there_for_nothing_and_long_beginnings_stand_once(lists):
    tree = grow(arrays(lists))
    used = {place for places in tree.places for place in places.tolist()}
    assert used == set(range(len(tree.tokens)))
    assert len(tree.tokens) <= sum(map(len, lists))
    whole = {tuple(s[: i + 1]) for s in lists for i in range(len(s))}
    assert len(tree.tokens) >= len(whole)


def test_a_prompt_shared_by_many_and_a_beginning_shared_by_all_stand_once():
    opening, one, other = [1] * 20, [2] * 10, [3] * 10
    endings = [[4 + i] * 5 for i in range(4)]
    sequences = [opening + one + e for e in endings] + [opening + other + e for e in endings]
    assert len(grow(arrays(sequences)).tokens) == 20 + 10 + 10 + 8 * 5


def test_beginnings_too_short_for_a_branch_are_written_again():
    short = module._BRANCH_TOKENS - 1
    tree = grow(arrays([[1] * short + [2] * 9, [1] * short + [3] * 9]))
    assert len(tree.tokens) == 2 * (short + 9)


@given(sequence_lists)
def test_stretches_cover_the_row_and_see_exactly_what_their_tokens_see(lists):
    tree = grow(arrays(lists))
    found = stretches(tree)
    assert [i for stretch in found for i in range(stretch.start, stretch.stop)] == list(range(len(tree.tokens)))
    for stretch in found:
        path = [i for s in stretch.path for i in range(found[s].start, found[s].stop)]
        assert tree.depths[path].tolist() == list(range(stretch.depth))
        for i in range(stretch.start, stretch.stop):
            seen = [j for j in range(i + 1) if tree.ends[j] > i]
            assert seen == path + list(range(stretch.start, i + 1))
            assert tree.depths[i] == stretch.depth + i - stretch.start
