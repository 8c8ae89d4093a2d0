"""Folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import time

import pytest

from dpo_cli.errors import UserError
from dpo_cli.system import storage
from dpo_cli.system.storage import (
    DamagedFolder,
    discard,
    is_filling,
    is_open_at,
    remove_old_strays,
    remove_strays,
    sealed_folder,
    verify,
    write_text,
)
from tests.faults.power import Disk
from tests.faults.shim import install


def seal(target, content="one", facts=None):
    with sealed_folder(target, facts if facts is not None else {}) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.bin").write_bytes(b"\0" * 1000)


def test_a_sealed_folder_verifies_and_carries_its_facts(tmp_path):
    seal(tmp_path / "x", facts={"step": 3})
    manifest = verify(tmp_path / "x")
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"a.txt", "inner/b.bin"}


def test_where_writing_fails_the_old_folder_stays_and_nothing_else_is_left(tmp_path):
    seal(tmp_path / "x")
    with pytest.raises(RuntimeError), sealed_folder(tmp_path / "x", {}) as folder:
        (folder / "a.txt").write_text("two")
        raise RuntimeError
    assert (tmp_path / "x" / "a.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_while_a_folder_is_filled_it_is_known(tmp_path):
    with pytest.raises(RuntimeError), sealed_folder(tmp_path / "x", {}):
        with sealed_folder(tmp_path / "y", {}):
            assert is_filling()
        assert is_filling()
        raise RuntimeError
    assert not is_filling()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    seal(tmp_path / "x")
    (tmp_path / "x" / "stray").write_text("old")
    seal(tmp_path / "x", "two")
    assert (tmp_path / "x" / "a.txt").read_text() == "two"
    assert not (tmp_path / "x" / "stray").exists()
    verify(tmp_path / "x")


@pytest.mark.parametrize("number", range(1, 12))
def test_a_crash_at_any_rename_or_flush_leaves_the_old_folder_or_the_new(tmp_path, monkeypatch, number):
    seal(tmp_path / "x")
    calls = 0

    class Crash(BaseException):
        pass

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Crash
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    with contextlib.suppress(Crash):
        seal(tmp_path / "x", "two")
    monkeypatch.undo()
    verify(tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() in ("one", "two")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.txt").write_text("eno"), "a.txt does not have the bytes"),
        (lambda f: (f / "a.txt").write_text("on"), "a.txt has 2 bytes instead of 3"),
        (lambda f: (f / "a.txt").unlink(), "a.txt is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a.txt": 5}}'), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../x": {}}}'), "outside the folder"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"/etc/passwd": {}}}'), "outside the folder"),
    ],
)
def test_every_damage_is_noticed_and_named(tmp_path, damage, message):
    seal(tmp_path / "x")
    damage(tmp_path / "x")
    with pytest.raises(DamagedFolder, match=message):
        verify(tmp_path / "x")


def test_a_text_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "t.txt"
    write_text(file, "one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "two")
    assert file.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_strays_are_removed_and_nothing_else(tmp_path):
    seal(tmp_path / "x")
    (tmp_path / ".x.tmp-1-abc").mkdir()
    (tmp_path / ".hidden").write_text("kept")
    remove_strays(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "x"]


def disk_after_power_cut(folder, work, operation, seed):
    """Work on a new disk until the power fails before an operation of this number, or after all; return the disk."""
    root = folder / f"disk-{operation}-{seed}"
    seal(root / "x")
    disk = Disk(str(root), f"{root}-aside")

    class Cut(BaseException):
        pass

    def before(found):
        if found.number == operation:
            raise Cut
        disk.before(found)

    uninstall = install(str(root), before, disk.after)
    try:
        with contextlib.suppress(Cut):
            work(root)
    finally:
        uninstall()
    disk.cut("some", seed)
    return root


@pytest.mark.parametrize("operation", range(1, 12))
def test_a_power_cut_leaves_a_discarded_folder_whole_or_a_stray(tmp_path, operation):
    for seed in range(20):
        root = disk_after_power_cut(tmp_path, lambda root: discard(root / "x"), operation, seed)
        if (root / "x").exists():
            verify(root / "x")


def test_what_was_removed_does_not_come_back_with_a_power_cut(tmp_path):
    for seed in range(20):
        root = disk_after_power_cut(tmp_path, lambda root: discard(root / "x"), 0, seed)
        assert list(root.iterdir()) == []

        def leave_and_remove_stray(root):
            (root / "x").rename(root / ".x.tmp-1-abc")
            remove_strays(root)

        root = disk_after_power_cut(tmp_path / "strays", leave_and_remove_stray, 0, seed)
        assert list(root.iterdir()) == []


def test_what_another_may_still_be_writing_stays_for_a_day(tmp_path):
    for name, hours in ((".x.tmp-1", 25), (".y.tmp-2", 23), ("z", 99)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("")
        for path in (tmp_path / name / "part", tmp_path / name):
            os.utime(path, (then := time.time() - hours * 3600, then))
    (tmp_path / ".w.tmp-3").mkdir()
    (tmp_path / ".w.tmp-3" / "part").write_text("new")
    os.utime(tmp_path / ".w.tmp-3", (0, 0))
    remove_old_strays(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".w.tmp-3", ".y.tmp-2", "z"]


def test_a_file_that_cannot_be_read_for_its_digest_seals_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(storage, "file_digest", refuse)
    with pytest.raises(OSError, match="Input/output error"), sealed_folder(tmp_path / "target", {}) as folder:
        (folder / "file").write_bytes(b"content")
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("DPO_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="no folder") as refused:
        storage.cache_root()
    assert "DPO_CACHE_DIR" in refused.value.hint


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_in_a_sealed_folder_may_be_read_by_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        with sealed_folder(tmp_path / "sealed", {}) as folder:
            (folder / "private").touch(0o600)
            (folder / "open").touch()
            (folder / "below").mkdir()
            (folder / "below/private").touch(0o600)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "sealed").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_an_open_file_is_told_from_one_that_took_its_place(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as file:
        assert is_open_at(file.fileno(), path)
        path.unlink()
        assert not is_open_at(file.fileno(), path)
        path.touch()
        assert not is_open_at(file.fileno(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
