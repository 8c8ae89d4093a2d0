"""A batch names every response token once, chosen responses first, whatever the layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.config.schema import TrainingSettings
from dpo_cli.data.prepared.step_plan import MicroBatch, PairSizes
from dpo_cli.data.records import TokenizedPair
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS, Packed
from dpo_cli.modeling.sending import Parcel
from tests.builders import prepare_pairs
from tests.conftest import ROW_OF, write_rows

tokens = st.lists(st.integers(1, 2), min_size=1, max_size=9)
"""Of two kinds only, so that sequences begin alike again and again."""

pair_lists = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5)


def test_every_layout_can_be_asked_for():
    assert set(TrainingSettings.model_json_schema()["properties"]["layout"]["enum"]) == {"auto", *LAYOUTS}


def sequences_of(lists):
    pairs = [TokenizedPair(*(np.array(part, np.int32) for part in three), origin="f:1") for three in lists]
    return pairs, [(p, c) for p, c, _ in lists] + [(p, r) for p, _, r in lists]


@pytest.mark.parametrize("name", LAYOUTS)
@given(st.lists(st.tuples(*[st.integers(1, 40)] * 3, st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 300))
def test_every_layout_cuts_each_pair_once_and_stays_in_the_budget_where_a_pair_alone_does(name, rows, budget):
    prompts, chosen, rejected, ids = (np.array(column) for column in zip(*rows, strict=True))
    sizes = PairSizes(prompts, chosen, rejected, chosen, ids)
    # Kernels that pad a row need more than a small budget for two pairs.
    for layout, within in zip(LAYOUTS[name].with_kernels(list(KERNELS.values()), (None,)), (256, 0, 0), strict=False):
        cuts = layout.cut(sizes, range(len(rows)), budget + within)
        assert sorted(index for cut in cuts for index in cut) == list(range(len(rows)))
        assert all(layout.tokens(sizes, cut) <= budget + within for cut in cuts if len(cut) > 1)


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


@pytest.mark.parametrize("name", LAYOUTS)
@given(lists=pair_lists)
def test_a_token_counts_as_often_as_there_are_sequences_that_it_is_in(name, lists):
    pairs, sequences = sequences_of(lists)
    batch = LAYOUTS[name].batch(range(len(pairs)), pairs)
    counted = batch.input_ids.flatten().repeat_interleave(batch.counts)
    assert sorted(counted.tolist()) == sorted(token for prompt, response in sequences for token in prompt + response)
    if batch.attention_mask is not None:
        assert torch.equal(batch.counts, batch.attention_mask.flatten())


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
    ids, depths, ends = batch.input_ids[0].numpy(), batch.tree.depths.numpy(), batch.tree.grown.ends
    place = iter(batch.positions.tolist())
    for prompt, response in sequences:
        for length in range(len(prompt), len(prompt) + len(response)):
            i = next(place)
            seen = [j for j in range(i + 1) if ends[j] > i]
            assert ids[seen].tolist() == [*prompt, *response][:length]
            assert depths[seen].tolist() == list(range(length))


@st.composite
def lists_with_gaps(draw):
    """Pairs of which each response has a few tokens that are not judged, and at least one that is."""
    lists = draw(pair_lists)
    return lists, [
        [draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r)).filter(any)) for r in three[1:]]
        for three in lists
    ]


def gaps_of(judged):
    """Write down which tokens are not judged: start, stop, start, stop, and so on."""
    edges = np.flatnonzero(np.diff(np.array([True, *judged, True], np.int8)))
    return edges.astype(np.int32) if len(edges) else None


@pytest.mark.parametrize("name", LAYOUTS)
@given(lists_with_gaps())
def test_tokens_that_are_not_judged_are_read_and_not_asked_for(name, drawn):
    lists, judged = drawn
    pairs, _ = sequences_of(lists)
    whole = LAYOUTS[name].batch(range(len(pairs)), pairs)
    pairs = [
        dataclasses.replace(pair, chosen_gaps=gaps_of(chosen), rejected_gaps=gaps_of(rejected))
        for pair, (chosen, rejected) in zip(pairs, judged, strict=True)
    ]
    batch = LAYOUTS[name].batch(range(len(pairs)), pairs)
    which = [chosen for chosen, _ in judged] + [rejected for _, rejected in judged]
    flat = torch.tensor([keep for one in which for keep in one])
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert torch.equal(batch.positions, whole.positions[flat])
    assert torch.equal(batch.targets, whole.targets[flat])
    assert batch.lengths == tuple(map(sum, which))
    assert batch.num_tokens == whole.num_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_margins_of_the_rows_reach_the_batch(tmp_path, tokenizer, layout):
    numbers = [{}, {"weight": 3, "margin": 0.1}, {"weight": 0}, {"margin": -2}]
    source = write_rows(tmp_path / "a.jsonl", [ROW_OF["instruction"] | given for given in numbers])
    pairs = prepare_pairs(source, tokenizer, tmp_path / "p")
    batch = Batches(pairs, LAYOUTS[layout], 1000, torch.device("cpu"))(MicroBatch((3, 1, 0, 2)))
    assert torch.equal(batch.weights, torch.tensor([1.0, 3.0, 1.0, 0.0]))
    assert torch.equal(batch.margins, torch.tensor([-2.0, 0.1, 0.0, 0.0]))
    moved = batch.to(torch.device("meta"))
    assert moved.weights.is_meta
    assert moved.margins.is_meta


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
@given(lists=pair_lists)
def test_a_kernel_that_pads_the_row_changes_nothing_that_is_counted_or_scored(kernel, lists):
    pairs, _ = sequences_of(lists)
    plain = LAYOUTS["packed"].batch(range(len(pairs)), pairs)
    batch = Packed(kernel, (None, 5)).batch(range(len(pairs)), pairs)
    size = plain.input_ids.shape[1]
    assert batch.input_ids.shape[1] == kernel.row_tokens(size)
    assert torch.equal(batch.input_ids[:, :size], plain.input_ids)
    assert torch.equal(batch.tree.depths[:size], plain.tree.depths)
    assert torch.equal(batch.counts[:size], plain.counts)
    assert not batch.counts[size:].any()
    assert torch.equal(batch.positions, plain.positions)
    assert torch.equal(batch.targets, plain.targets)
    assert batch.num_tokens == plain.num_tokens


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_what_a_kernel_needs_of_a_tree_travels_with_the_batch_by_one_copy(kernel):
    pairs, _ = sequences_of([([1] * 9, [2] * 7, [3] * 5), ([4] * 9, [2] * 7, [3] * 5)])
    batch = Packed(kernel, (None, 5)).batch(range(2), pairs)
    arrived = Parcel.of(batch, pinned=False).to(torch.device("cpu"))
    assert set(arrived.tree.indices) == {None, 5}
    for window, before in batch.tree.indices.items():
        for ours, sent in zip(before, arrived.tree.indices[window], strict=True):
            assert torch.equal(ours, sent)
            assert ours.dtype == sent.dtype == torch.int32
    assert arrived.tree.depths.untyped_storage().data_ptr() == arrived.input_ids.untyped_storage().data_ptr()
    expected = {tensor.untyped_storage().data_ptr() for tensor in arrived.tree.indices[5]}
    assert expected <= {arrived.input_ids.untyped_storage().data_ptr()}
