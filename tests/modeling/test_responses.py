"""Which hidden states predict which tokens, and which tokens are whose, against the definitions."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.modeling.responses import Predictions, Responses

lengths_of_pairs = st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(1, 40), min_size=2 * n, max_size=2 * n))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_chunks_name_each_token_once_with_the_hidden_state_that_predicts_it(positions, size):
    found = Predictions.of(np.array(positions))
    assert found.states.tolist() == sorted(set(positions))
    assert found.positions.tolist() == positions
    chunks = found.chunks(size)
    assert [state for chunk, _ in chunks for state in found.states[chunk].tolist()] == found.states.tolist()
    assert all(chunk.stop - chunk.start <= size for chunk, _ in chunks)
    assert sorted(token for _, tokens in chunks for token in tokens.tolist()) == list(range(len(positions)))
    for chunk, tokens in chunks:
        assert {positions[token] for token in tokens.tolist()} == set(found.states[chunk].tolist())


@given(lengths_of_pairs)
def test_both_ways_to_add_up_are_the_sums_and_have_the_same_gradient(lengths):
    """Whole numbers, so that no order of additions rounds."""
    responses = Responses.of(lengths)
    values = torch.arange(sum(lengths), dtype=torch.float32, requires_grad=True)
    ends = np.cumsum(lengths)
    expected = [sum(range(end - length, end)) for end, length in zip(ends.tolist(), lengths, strict=True)]
    factors = torch.arange(1.0, len(lengths) + 1)
    for add_up in (responses.sums, responses.sums_at_once):
        sums = add_up(values)
        assert sums.tolist() == expected
        (slopes,) = torch.autograd.grad(sums @ factors, values)
        assert slopes.tolist() == [place + 1.0 for place, length in enumerate(lengths) for _ in range(length)]


@given(lengths_of_pairs)
def test_what_is_beyond_the_shorter_response_is_told_of_each_pair(lengths):
    responses, half = Responses.of(lengths), len(lengths) // 2
    shorter = [min(lengths[place % half], lengths[place % half + half]) for place in range(len(lengths))]
    beyond = [offset >= short for length, short in zip(lengths, shorter, strict=True) for offset in range(length)]
    assert responses.beyond.tolist() == beyond
    assert responses.counts.tolist() == lengths
    assert responses.num_pairs == half
