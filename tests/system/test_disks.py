"""Which processes share a disk is found out, whatever the disks are like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.system.disks import first_of_each_disk
from tests.waiting import PATIENCE


def asked_by_ranks(folders):
    """Let a thread for each rank ask about its folder; return what each of them was told."""
    barrier, rounds = Barrier(len(folders)), {}

    def gathering(rank):
        asked = iter(range(2))

        def gather(items):
            found = rounds.setdefault(next(asked), {})
            found[rank] = items
            barrier.wait(PATIENCE)
            return [item for other in sorted(found) for item in found[other]]

        return gather

    with ThreadPoolExecutor(len(folders)) as threads:
        ranks = range(len(folders))
        return list(threads.map(lambda rank: first_of_each_disk(folders[rank], gathering(rank)), ranks))


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_each_rank_is_told_the_first_that_sees_its_files(tmp_path_factory, disks):
    root = tmp_path_factory.mktemp("disks")
    found = asked_by_ranks([root / str(disk) / "cache" for disk in disks])
    assert found == [[disks.index(disk) for disk in disks]] * len(disks)
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_a_disk_that_takes_no_file_has_no_writer(tmp_path):
    (tmp_path / "full").write_text("no folder")
    folders = [tmp_path / "shared", tmp_path / "full" / "cache", tmp_path / "shared"]
    assert asked_by_ranks(folders) == [[0, None, 0]] * 3
