"""Computed block masks against masks of every token with every other, and against those that torch makes itself."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from dpo_cli.modeling.attention import blocks, kernels
from dpo_cli.modeling.attention.blocks import block_indices, rule_numbers
from dpo_cli.modeling.attention.flex import sees
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.tree import grow, padded
from tests.modeling.attention.rows import sequence_lists, windows

SMALL = 4
"""Tokens of a block where hypothesis draws the trees: else all of them would be in one."""


def row(lists):
    """Return the tree of some sequences, padded as FlexAttention asks for it, and its tokens without the padding."""
    tree = grow([np.array(sequence, np.int32) for sequence in lists])
    return padded(tree, KERNELS["flex"].row_tokens(len(tree.tokens))), len(tree.tokens)


def seen_by_sequences(tree, size, window):
    """What every token sees, read off the sequences themselves; padding sees itself."""
    seen = np.eye(len(tree.tokens), dtype=bool)
    for place in tree.places:
        for at, i in enumerate(place):
            seen[i, place[max(0, at + 1 - (window or len(place))) : at + 1]] = True
    assert not seen[size:, :size].any()
    return seen


def listed(num, places):
    """Return the blocks that a mask lists, as a matrix."""
    marked = np.zeros(places.shape[-2:], bool)
    for at, count in enumerate(num[0, 0]):
        marked[at, places[0, 0, at, :count]] = True
    return marked


def check(tree, size, window, block):
    found = block_indices(tree, window)
    part, full = listed(found.kv_num, found.kv), listed(found.full_kv_num, found.full_kv)
    seen = seen_by_sequences(tree, size, window)
    tiles = seen.reshape(len(part), block, len(part), block)
    assert not (tiles.any((1, 3)) & ~(part | full)).any(), "a block is missed"
    assert not (full & ~tiles.all((1, 3))).any(), "a block is called full and is not"
    assert not (part & full).any()
    assert np.array_equal(listed(found.q_num, found.q), part.T)
    assert np.array_equal(listed(found.full_q_num, found.full_q), full.T)
    numbers = [torch.from_numpy(array) for array in rule_numbers(tree, window)]
    assert np.array_equal(create_mask(sees(*numbers), 1, 1, len(seen), len(seen), "cpu")[0, 0].numpy(), seen)
    return part, full, numbers


@settings(deadline=None, max_examples=150)
@given(sequence_lists, windows)
def test_no_block_that_is_seen_is_missed_and_none_is_called_full_that_is_not(lists, window):
    with mock.patch.object(blocks, "BLOCK_TOKENS", SMALL), mock.patch.object(kernels, "BLOCK_TOKENS", SMALL):
        check(*row(lists), window, SMALL)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 260), st.integers(1, 300), st.integers(1, 200), st.integers(1, 200)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([None, 1, 64, 128, 300]),
)
def test_blocks_of_real_size_are_those_of_torch(shapes, window):
    """Pairs behind one system message: prompts of other lengths, two responses each."""
    lists = []
    for number, (system, prompt, chosen, rejected) in enumerate(shapes):
        beginning = [1] * system + [number + 2] * prompt
        lists += [beginning + [100] * chosen, beginning + [101] * rejected]
    tree, size = row(lists)
    part, full, numbers = check(tree, size, window, 128)
    theirs = create_block_mask(sees(*numbers), None, None, len(tree.tokens), len(tree.tokens), device="cpu")
    seen = listed(theirs.kv_num_blocks.numpy(), theirs.kv_indices.numpy())
    whole = listed(theirs.full_kv_num_blocks.numpy(), theirs.full_kv_indices.numpy())
    assert not ((seen | whole) & ~(part | full)).any()
    assert not (full & ~whole).any()
    if window is None:
        # Without a window what is counted by ends is exact.
        assert np.array_equal(full, whole)


def test_blocks_of_queries_are_listed_as_torch_lists_them():
    tree, _ = row([[1] * 300 + [2] * 200, [1] * 300 + [3] * 250, [4] * 180])
    found = [torch.from_numpy(array) for array in block_indices(tree, 150)]
    theirs = BlockMask.from_kv_blocks(*found[:4])
    ours = listed(found[4].numpy(), found[5].numpy()), listed(found[6].numpy(), found[7].numpy())
    assert np.array_equal(ours[0], listed(theirs.q_num_blocks.numpy(), theirs.q_indices.numpy()))
    assert np.array_equal(ours[1], listed(theirs.full_q_num_blocks.numpy(), theirs.full_q_indices.numpy()))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256, 257, 1000])
def test_padding_sees_itself_is_seen_by_nobody_and_belongs_to_no_sequence(size):
    tree, tokens = row([[1] * size])
    assert tokens == size
    assert len(tree.tokens) % 128 == 0
    assert len(tree.tokens) >= 256
    seen = seen_by_sequences(tree, size, None)
    assert np.array_equal(seen[size:], np.eye(len(tree.tokens), dtype=bool)[size:])
    assert np.array_equal(seen[:, size:], np.eye(len(tree.tokens), dtype=bool)[:, size:])
    check(tree, size, None, 128)


def test_what_a_window_leaves_out_is_skipped():
    """Of a long sequence each block sees itself and as many before it as the window reaches into."""
    part, full, _ = check(*row([[1] * 1280]), 256, 128)
    assert (part | full).sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert full.sum(1).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
