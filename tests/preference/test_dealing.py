"""Micro-batches are dealt so that every pair is scored once, and every rank makes as many forward passes."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.prepared.step_plan import MicroBatch
from dpo_cli.preference.dealing import deal


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 4))
def test_each_micro_batch_is_one_rank_s_and_all_ranks_take_as_many_turns(sizes, num_ranks):
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    cuts = [MicroBatch(tuple(range(end - size, end))) for end, size in zip(ends, sizes, strict=True)]
    seen = [[] for _ in range(num_ranks)]
    shares = [
        list(deal(cuts, SimpleNamespace(process_index=rank, num_processes=num_ranks), seen[rank].append))
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    real = [cut for share in shares for cut in share if not cut.filler]
    assert sorted(real, key=lambda cut: cut.pairs) == cuts
    # Progress is called alike on every rank, and not for the last turn, which ends when results are gathered.
    assert all(calls == seen[0] for calls in seen)
    assert seen[0] == ends[num_ranks - 1 : -1 : num_ranks]
