"""Micro-batches are dealt so that every pair is scored once, and every rank makes as many forward passes."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.prepared.step_plan import DataRank, MicroBatch, deal
from dpo_cli.preference.dealing import dealt

some_sizes = st.lists(st.integers(1, 4), max_size=19)


def cuts_of(sizes):
    """Micro-batches of so many pairs each, and how many pairs there are up to the end of each."""
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return [MicroBatch(tuple(range(end - size, end))) for end, size in zip(ends, sizes, strict=True)], ends


@given(some_sizes, st.integers(1, 8))
def test_each_micro_batch_is_one_rank_s_and_all_ranks_take_as_many_turns(sizes, num_ranks):
    cuts, _ = cuts_of(sizes)
    shares = [deal(cuts, DataRank(rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    real = [cut for share in shares for cut in share if not cut.filler]
    assert sorted(real, key=lambda cut: cut.pairs) == cuts
    # Fillers are forward passes beside another rank's last one, and no rank takes two of them.
    assert all(cut.pairs == cuts[-1].pairs for share in shares for cut in share if cut.filler)
    assert all(sum(cut.filler for cut in share) <= 1 for share in shares)


@given(some_sizes, st.integers(1, 8))
def test_progress_is_called_alike_on_every_rank(sizes, num_ranks):
    """Not for the last turn, which ends when results are gathered."""
    cuts, ends = cuts_of(sizes)
    for rank in range(num_ranks):
        seen = []
        accelerator = SimpleNamespace(process_index=rank, num_processes=num_ranks)
        assert tuple(dealt(cuts, accelerator, seen.append)) == deal(cuts, DataRank(rank, num_ranks))
        assert seen == ends[num_ranks - 1 : -1 : num_ranks]
