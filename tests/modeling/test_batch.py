"""A batch names every response token once, chosen responses first, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.batch import LAYOUTS

tokens = st.lists(st.integers(1, 2), min_size=1, max_size=9)
"""Of two kinds only, so that sequences begin alike again and again."""

pair_lists = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5)


def test_every_layout_can_be_asked_for():
    assert set(TrainingSettings.model_json_schema()["properties"]["layout"]["enum"]) == {"auto", *LAYOUTS}


def sequences_of(lists):
    pairs = [TokenizedPair(*(np.array(part, np.int32) for part in three), origin="f:1") for three in lists]
    return pairs, [(p, c) for p, c, _ in lists] + [(p, r) for p, _, r in lists]


@pytest.mark.parametrize("name", LAYOUTS)
@given(lists=pair_lists)
def test_targets_lengths_and_predicting_tokens_are_those_of_the_pairs(name, lists):
    pairs, sequences = sequences_of(lists)
    batch = LAYOUTS[name].batch(range(len(pairs)), pairs)
    assert batch.lengths == tuple(len(response) for _, response in sequences)
    assert batch.targets.tolist() == [token for _, response in sequences for token in response]
    assert batch.num_tokens == sum(len(prompt) + len(response) for prompt, response in sequences)
    before = batch.input_ids.flatten()[batch.positions].tolist()
    assert before == [token for prompt, response in sequences for token in [prompt[-1], *response[:-1]]]


@given(pair_lists)
def test_padded_rows_are_the_sequences(lists):
    pairs, sequences = sequences_of(lists)
    batch = LAYOUTS["padded"].batch(range(len(pairs)), pairs)
    for row, (prompt, response) in enumerate(sequences):
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == [*prompt, *response]


@given(pair_lists)
def test_what_a_packed_response_token_sees_is_its_own_sequence_in_order(lists):
    pairs, sequences = sequences_of(lists)
    batch = LAYOUTS["packed"].batch(range(len(pairs)), pairs)
    ids, depths, ends = batch.input_ids[0].numpy(), batch.tree.depths.numpy(), batch.tree.ends.numpy()
    place = iter(batch.positions.tolist())
    for prompt, response in sequences:
        for length in range(len(prompt), len(prompt) + len(response)):
            i = next(place)
            seen = [j for j in range(i + 1) if ends[j] > i]
            assert ids[seen].tolist() == [*prompt, *response][:length]
            assert depths[seen].tolist() == list(range(length))
