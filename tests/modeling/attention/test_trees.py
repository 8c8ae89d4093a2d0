"""Attention over a tree: its rule, pieces against one mask over the whole row, and what is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from dpo_cli.modeling.attention import pieces as module
from dpo_cli.modeling.attention.pieces import PieceMask
from dpo_cli.modeling.attention.trees import (
    TREE_ATTENTION,
    CannotPack,
    TokenTree,
    reading,
    tree_attention,
    tree_mask,
)
from dpo_cli.modeling.tree import grow
from tests.modeling.attention.rows import (
    HEADS,
    WIDTH,
    dense,
    drawn,
    plain_attention,
    sequence_lists,
    token_tree,
    windows,
)


def test_the_rule_of_a_small_tree_is_what_can_be_read_off_it():
    """Prompt 1 1 1 1, then two sequences of two tokens each."""
    tree = token_tree([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 3, 3]])
    expected = [
        "1.......", "11......", "111.....", "1111....",
        "11111...", "111111..",
        "1111..1.", "1111..11",
    ]  # fmt: skip
    rows = ["".join("1" if seen else "." for seen in row) for row in dense(tree, None).tolist()]
    assert rows == expected
    rows = ["".join("1" if seen else "." for seen in row) for row in dense(tree, 3).tolist()]
    assert rows[5] == "...111.."
    assert rows[6] == "..11..1."


@given(sequence_lists, windows)
def test_the_rule_lets_a_token_see_those_before_it_in_its_own_sequences(lists, window):
    grown = grow([np.array(sequence, np.int32) for sequence in lists])
    expected = torch.zeros(len(grown.tokens), len(grown.tokens), dtype=torch.bool)
    for place in grown.places:
        for at, i in enumerate(place):
            expected[i, place[max(0, at + 1 - (window or len(place))) : at + 1]] = True
    assert torch.equal(dense(TokenTree.of(grown), window), expected)


@settings(deadline=None, max_examples=60)
@given(sequence_lists, windows, st.sampled_from([None, 1.5]), st.sampled_from([None, 0.7]), st.sampled_from([1, 2, 4]))
def test_attention_block_by_block_is_attention_under_the_whole_rule(lists, window, softcap, scaling, key_heads):
    tree = token_tree(lists)
    inputs = drawn(len(tree.depths), key_heads)
    mask = PieceMask(tree.stretches, window)
    found, weights = tree_attention(torch.nn.Module(), *inputs, mask, scaling=scaling, softcap=softcap)
    expected = plain_attention(*inputs, dense(tree, window), scaling, softcap)
    assert weights is None
    assert found.is_contiguous()
    # Capped scores go through softmax in float32, as the architectures that have them do it.
    near = {"rtol": 1e-9, "atol": 1e-11} if softcap is None else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **near)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    gradients = (torch.autograd.grad(outcome, inputs, upstream) for outcome in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 3, 40])
def test_stretches_are_cut_for_calls_and_threads_without_a_difference(window, threads, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 6)
    monkeypatch.setattr(module, "_FEWEST_QUERIES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tree = token_tree([[1] * 30 + [2] * 25, [1] * 30 + [3] * 12, [1] * 9 + [4] * 20])
    inputs = drawn(len(tree.depths), 2 if threads == 3 else 1)
    found, _ = tree_attention(torch.nn.Module(), *inputs, PieceMask(tree.stretches, window))
    expected = plain_attention(*inputs, dense(tree, window), None, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    gradients = (torch.autograd.grad(outcome, inputs, upstream) for outcome in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_what_the_blocks_of_a_stretch_see_is_not_copied():
    key, ranges = torch.randn(1, 2, 300, WIDTH, requires_grad=True), [(0, 128), (10, 256), (138, 300)]
    seen = module._slices(key, ranges)
    assert {tensor.untyped_storage().data_ptr() for tensor in seen} == {key.untyped_storage().data_ptr()}
    plain = [key[:, :, start:stop] for start, stop in ranges]
    upstream = [torch.randn(tensor.shape) for tensor in plain]
    ours, theirs = (torch.autograd.grad(found, key, upstream)[0] for found in (seen, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"s_aux": torch.zeros(HEADS)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"is_causal": False}, "both directions"),
        ({"output_attentions": True}, "output_attentions"),
        ({"dropout": 0.1}, "dropout"),
        ({"something_new": 3, "s_aux": torch.zeros(HEADS)}, "sinks, something_new"),
    ],
)
def test_what_attention_over_a_tree_does_not_do_is_refused(asked, said):
    tree = token_tree([[1, 2, 3]])
    with pytest.raises(CannotPack, match=f"its attention has {said}"):
        tree_attention(torch.nn.Module(), *drawn(3, 4), PieceMask(tree.stretches, None), **asked)


def test_what_is_without_effect_is_accepted():
    tree = token_tree([[1, 2, 3]])
    options = {"dropout": 0.0, "is_causal": True, "sliding_window": 2, "position_ids": torch.arange(3), "s_aux": None}
    mask, inputs = PieceMask(tree.stretches, None), drawn(3, 4)
    found, _ = tree_attention(torch.nn.Module(), *inputs, attention_mask=mask, **options)
    assert torch.equal(found, tree_attention(torch.nn.Module(), *inputs, mask)[0])


@pytest.mark.parametrize(
    ("config", "make", "said"),
    [
        (LlamaConfig(attention_chunk_size=8), create_chunked_causal_mask, "chunks"),
        (LlamaConfig(), create_bidirectional_mask, "special rules"),
        (
            LlamaConfig(),
            functools.partial(create_causal_mask, or_mask_function=lambda batch, head, q, k: k < 2),
            "special rules",
        ),
    ],
    ids=["chunks", "both directions", "a rule more"],
)
def test_masks_that_are_no_window_are_refused_when_the_model_asks_for_them(config, make, said):
    config._attn_implementation = TREE_ATTENTION
    tree = token_tree([[1, 2, 3]])
    with reading(tree), pytest.raises(CannotPack, match=said):
        make(config=config, inputs_embeds=torch.zeros(1, 3, 4), attention_mask=None, past_key_values=None)


def test_masks_are_made_with_the_window_that_the_model_asks_for_and_only_while_a_tree_is_read():
    config = MistralConfig(sliding_window=5)
    config._attn_implementation = TREE_ATTENTION
    tree = token_tree([[1, 2, 3]])
    asked = {"config": config, "inputs_embeds": torch.zeros(1, 3, 4), "attention_mask": None, "past_key_values": None}
    with reading(tree):
        assert create_causal_mask(**asked) == PieceMask(tree.stretches, None)
        assert create_sliding_window_causal_mask(**asked) == PieceMask(tree.stretches, 5)
    with pytest.raises(CannotPack, match="no prefix tree"):
        tree_mask(config=config)


def test_a_block_looks_at_no_more_keys_than_its_window_reaches(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_TOKENS", 4)
    (stretch,) = token_tree([[1] * 18]).stretches
    starts, stops = [0, 4, 8, 12, 16], [4, 8, 12, 16, 18]
    for window in (1, 4, 5, 6, 20):
        firsts = [max(0, start - window + 1) for start in starts]
        assert PieceMask((stretch,), window).reads == (((0,), [4, 4, 4, 4, 2], list(zip(firsts, stops, strict=True))),)


def test_of_the_stretches_before_it_one_reads_those_within_its_window():
    """A system message of 40 tokens, two prompts of 30 and two responses to each."""
    prompts = [[1] * 40 + [number] * 30 for number in (2, 3)]
    tree = token_tree([[*prompt, *[number] * 20] for prompt in prompts for number in (4, 5)])
    assert [read.stretches for read in PieceMask(tree.stretches, None).reads][:4] == [
        (0,),
        (0, 1),
        (0, 1, 2),
        (0, 1, 3),
    ]
    # Of 31 tokens that it sees, the first of a response has 30 before it: all of the prompt.
    assert [read.stretches for read in PieceMask(tree.stretches, 31).reads][:4] == [(0,), (0, 1), (1, 2), (1, 3)]
    assert [read.stretches for read in PieceMask(tree.stretches, 1).reads] == [(i,) for i in range(len(tree.stretches))]


@pytest.mark.parametrize(
    ("queries", "heads", "threads", "parts"),
    [
        (128, 3, 2, 2),  # two and one become three and three
        (128, 3, 1, 1),
        (128, 4, 2, 1),
        (128, 3, 16, 4),  # else thirteen would wait
        (128, 5, 8, 1),
        (127, 3, 2, 1),  # does not come out even
        (20, 3, 2, 1),  # too few to be parted
    ],
)
def test_queries_are_parted_where_threads_would_wait_for_each_other(queries, heads, threads, parts):
    assert module._parts(queries, heads, threads) == parts


def test_the_masks_of_a_long_row_do_not_grow_with_its_square():
    for tokens in (1000, 8000):
        tree = token_tree([[1] * tokens])
        mask = PieceMask(tree.stretches, None)
        for (_, _, ranges), like in zip(mask.reads, [torch.zeros(1)], strict=True):
            shown = [mask.of(128, stop - first, like) for first, stop in ranges[:-1]]
        assert {part.untyped_storage().nbytes() for part in shown} == {4 * 128 * tokens}
        assert len({part.untyped_storage().data_ptr() for part in shown}) == 1
