"""Attention with gathered keys: the documented contract of the kernel, in plain loops, gives what pieces give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.modeling.attention import varlen
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.attention.trees import CannotPack, tree_attention
from tests.modeling.attention.rows import dense, drawn, plain_attention, sequence_lists, token_tree, windows


def attended_in_loops(
    query, key, value, query_starts, key_starts, most_queries, most_keys, *, scale, window_size, enable_gqa
):
    """What `varlen_attn` documents, query by query: `[queries, heads, d]`, sequences aligned at their last tokens.

    The window counts tokens to the left of a query's own place and to the right of it; -1: all of them.
    """
    left, right = window_size
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    rows = []
    for sequence in range(len(query_starts) - 1):
        q = query[query_starts[sequence] : query_starts[sequence + 1]]
        k, v = (tensor[key_starts[sequence] : key_starts[sequence + 1]] for tensor in (key, value))
        assert len(q) <= most_queries
        assert len(k) <= most_keys
        for at in range(len(q)):
            own = at + len(k) - len(q)
            first = 0 if left < 0 else max(0, own - left)
            last = len(k) if right < 0 else own + right + 1
            keys, values = (part[first:last].repeat_interleave(groups, 1) for part in (k, v))
            scores = torch.einsum("hd,khd->hk", q[at], keys) * (scale or q.shape[-1] ** -0.5)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def _in_loops(monkeypatch):
    """There is no kernel on a CPU, and none in float64."""
    monkeypatch.setattr(varlen, "varlen_attn", attended_in_loops)
    monkeypatch.setattr(varlen, "_COMPUTED_IN", (torch.float64,))


def same_width(num_tokens, key_heads):
    query, key, _ = drawn(num_tokens, key_heads)
    return [query, key, torch.randn_like(key).requires_grad_()]


@settings(deadline=None, max_examples=40)
@given(sequence_lists, windows, st.sampled_from([None, 0.7]), st.sampled_from([1, 2, 4]))
def test_gathered_keys_are_those_that_each_piece_sees(lists, window, scaling, key_heads):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(varlen, "varlen_attn", attended_in_loops)
        patched.setattr(varlen, "_COMPUTED_IN", (torch.float64,))
        tree = token_tree(lists, KERNELS["varlen"], (window,))
        inputs = same_width(len(tree.depths), key_heads)
        found, _ = tree_attention(torch.nn.Module(), *inputs, tree.mask(window), scaling=scaling)
    expected = plain_attention(*inputs, dense(tree, window), scaling, None)
    pieces, _ = tree_attention(torch.nn.Module(), *inputs, token_tree(lists).mask(window), scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, pieces, rtol=1e-9, atol=1e-11)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    gradients = (torch.autograd.grad(outcome, inputs, upstream) for outcome in (found, pieces))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_no_more_keys_are_gathered_than_the_window_reaches():
    lists = [[1] * 40 + [2] * 10, [1] * 40 + [3] * 12]
    for window, gathered in [(None, 40 + 50 + 52), (5, 40 + 14 + 16), (1, 40 + 10 + 12), (100, 40 + 50 + 52)]:
        mask = token_tree(lists, KERNELS["varlen"], (window,)).mask(window)
        assert len(mask.keys) == gathered
        assert mask.most_queries == 40
        assert mask.most_keys == int(np.diff(mask.key_starts).max())


@pytest.mark.parametrize(
    ("asked", "width", "dtype", "said"),
    [
        ({"softcap": 50.0}, 8, torch.float64, "a soft cap"),
        ({}, 6, torch.float64, "another width"),
        ({}, 8, torch.float32, "16 bits alone, and the run in float32"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(asked, width, dtype, said):
    query, key, _ = (tensor.to(dtype) for tensor in drawn(3, 4))
    value = torch.zeros(*key.shape[:3], width, dtype=dtype)
    mask = token_tree([[1, 2, 3]], KERNELS["varlen"]).mask(None)
    with pytest.raises(CannotPack, match=said):
        tree_attention(torch.nn.Module(), query, key, value, mask, **asked)
