"""The power cut of the bench takes what was not synced, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_cli.system.storage import flushed_digest
from tests.faults.power import KEPT, Disk
from tests.faults.shim import install


@pytest.fixture
def cut(tmp_path: Path) -> Callable[[Callable[[Path], object], str], dict[str, bytes]]:
    """Return the function that works on a folder, cuts the power and returns the files that are left."""
    root = tmp_path / "disk"
    root.mkdir()
    (root / "old").write_bytes(b"old")

    def work_and_cut(work: Callable[[Path], object], kept: str) -> dict[str, bytes]:
        disk = Disk(str(root), str(tmp_path / "aside"))
        uninstall = install(str(root), disk.before, disk.after)
        try:
            work(root)
        finally:
            uninstall()
        disk.cut(kept, seed=0)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    return work_and_cut


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("kept", KEPT)
def test_what_was_synced_stays(cut, kept):
    def work(root):
        (root / "new").write_bytes(b"12345")
        (root / "new").replace(root / "old")
        (root / "folder").mkdir()
        (root / "folder" / "inner").write_bytes(b"6")
        for path in (root / "old", root, root / "folder" / "inner", root / "folder"):
            sync(path)

    assert cut(work, kept) == {"old": b"12345", "folder/inner": b"6"}


@pytest.mark.parametrize(
    ("kept", "left"), [("nothing", {"old": b"old"}), ("names", {"old": b""}), ("zeros", {"old": b"\0" * 5})]
)
def test_a_rename_before_its_file_was_synced(cut, kept, left):
    def work(root):
        (root / "new").write_bytes(b"12345")
        (root / "new").replace(root / "old")

    assert cut(work, kept) == left


def test_bytes_after_the_last_sync_are_lost(cut):
    def work(root):
        with (root / "old").open("ab") as file:
            file.write(b"er")
            file.flush()
            os.fsync(file.fileno())
            file.write(b" and lost")

    assert cut(work, "nothing") == {"old": b"older"}


def test_a_file_that_a_process_flushed_for_another_stays_with_its_name(cut):
    def work(root):
        (root / "part").write_bytes(b"1234")
        flushed_digest(root / "part")

    assert cut(work, "nothing") == {"old": b"old", "part": b"1234"}


def test_what_was_removed_comes_back(cut):
    def work(root):
        (root / "folder").mkdir()
        (root / "folder" / "inner").write_bytes(b"6")
        for path in (root / "folder" / "inner", root / "folder", root):
            sync(path)
        shutil.rmtree(root / "folder")
        (root / "old").unlink()

    assert cut(work, "nothing") == {"old": b"old", "folder/inner": b"6"}


def test_a_folder_whose_name_was_not_synced_is_gone_with_all_that_is_in_it(cut):
    def work(root):
        (root / "folder").mkdir()
        (root / "folder" / "inner").write_bytes(b"6")
        sync(root / "folder" / "inner")
        sync(root / "folder")

    assert cut(work, "nothing") == {"old": b"old"}
