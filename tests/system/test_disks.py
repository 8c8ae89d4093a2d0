"""Which processes share a disk is found out, whatever the disks are like."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.errors import UserError
from dpo_cli.system.disks import first_of_each_disk
from dpo_cli.training import together
from dpo_cli.training.together import check_shared
from tests.waiting import PATIENCE

HOST = re.escape(socket.gethostname())


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


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_folder_that_takes_no_file_is_not_called_unshared(tmp_path, monkeypatch, num_ranks):
    """All processes are on one machine, and exchange the same."""
    monkeypatch.setattr(together, "gather_object", lambda items: items * num_ranks)
    asked = num_ranks, "resuming needs", "start anew"
    check_shared(tmp_path / "run", *asked)
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(UserError, match=rf"^resuming needs .*: rank 0 \(on {HOST}\) cannot write to it"):
        check_shared(tmp_path / "full" / "run", *asked)
