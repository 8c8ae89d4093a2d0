"""Rows of tokens for the tests of attention: trees, what is attended to, and the definition kernels are held to."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from dpo_cli.modeling.attention.blocks import rule_numbers
from dpo_cli.modeling.attention.flex import sees
from dpo_cli.modeling.attention.kernels import PIECES
from dpo_cli.modeling.attention.trees import TokenTree
from dpo_cli.modeling.tree import grow

HEADS, WIDTH, VALUE_WIDTH = 4, 8, 6

sequence_lists = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=24), min_size=1, max_size=6)
"""Of two tokens only, so that sequences begin alike again and again."""

windows = st.one_of(st.none(), st.integers(1, 9))


def token_tree(lists, kernel=PIECES, layers=(None,)):
    return TokenTree.of(grow([np.array(sequence, np.int32) for sequence in lists]), kernel, layers)


def dense(tree, window):
    """The rule that CUDA gets, asked of every two tokens."""
    place = torch.arange(len(tree.depths))
    rule = sees(*(torch.from_numpy(numbers) for numbers in rule_numbers(tree.grown, window)))
    return rule(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])


def drawn(num_tokens, key_heads, seed=0):
    """Queries, keys and values, with gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, WIDTH), (key_heads, WIDTH), (key_heads, VALUE_WIDTH))
    return [
        torch.randn(1, heads, num_tokens, width, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, width in shapes
    ]


def plain_attention(query, key, value, seen, scaling, softcap):
    """The definition, with one mask over the whole row; `[1, T, heads, d']`."""
    groups = query.shape[1] // key.shape[1]
    attended = []
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // groups].T * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        attended.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[0, head // groups])
    return torch.stack(attended, dim=1)[None]
