"""A batch names every response token once, chosen responses first."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.batch import LAYOUTS

sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)


@given(sizes, st.sampled_from(sorted(LAYOUTS)))
def test_targets_positions_and_mask_are_those_of_the_pairs(lengths, layout):
    counter = iter(range(1, 10_000))
    pairs = [
        TokenizedPair(*(np.array([next(counter) for _ in range(n)], np.int32) for n in three), origin="f:1")
        for three in lengths
    ]
    batch = LAYOUTS[layout](range(len(pairs)), pairs)
    responses = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    assert batch.lengths == tuple(len(r) for r in responses)
    assert batch.targets.tolist() == [int(t) for r in responses for t in r]
    assert len(set(batch.positions.tolist())) == len(batch.positions)

    before = batch.input_ids.flatten()[batch.positions].tolist()
    expected = [int(t) for p, r in zip(pairs * 2, responses, strict=True) for t in [*p.prompt[-1:], *r[:-1]]]
    assert before == expected
    assert batch.num_tokens == int(batch.attention_mask.sum())
    for row, (pair, response) in enumerate(zip(pairs * 2, responses, strict=True)):
        seen = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        assert seen == [*pair.prompt.tolist(), *response.tolist()]
