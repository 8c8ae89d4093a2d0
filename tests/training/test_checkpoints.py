"""Checkpoints in order of their steps, the newest whole one first."""

from __future__ import annotations

import shutil

import pytest

from dpo_cli.errors import UserError
from dpo_cli.storage import sealed_folder
from dpo_cli.training.checkpoints import _prune, newest_whole


def make(folder, *steps):
    for step in steps:
        with sealed_folder(folder / f"step-{step:06d}", {"step": step}) as temporary:
            (temporary / "model.safetensors").write_bytes(b"x" * step)


def test_the_newest_is_told_by_its_number_and_not_by_its_name(tmp_path):
    make(tmp_path, 9, 999_999, 1_000_000)
    assert newest_whole(tmp_path).name == "step-1000000"


def test_damaged_ones_are_passed_over_until_a_whole_one_is_found(tmp_path):
    make(tmp_path, 1, 2, 3)
    (tmp_path / "step-000003" / "model.safetensors").write_bytes(b"xxz")
    (tmp_path / "step-000002" / "manifest.json").unlink()
    assert newest_whole(tmp_path).name == "step-000001"
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "nothing") is None


def test_what_is_not_a_checkpoint_is_neither_taken_nor_pruned(tmp_path):
    make(tmp_path, 5, 6, 7)
    (tmp_path / "step-mine").mkdir()
    (tmp_path / ".step-000008.tmp-1-a").mkdir()
    assert newest_whole(tmp_path).name == "step-000007"
    _prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000008.tmp-1-a", "step-000007", "step-mine"]
