"""Checkpoints in order of their steps, the newest whole one first."""

from __future__ import annotations

import json
import shutil

import pytest

from dpo_cli.errors import UserError
from dpo_cli.modeling.digests import SCHEME
from dpo_cli.system.storage import DamagedFolder, sealed_folder
from dpo_cli.training.checkpoints import PRECISION, beginning_of, check_whole, held_at_beginning, newest_whole, prune

STANDS_ON = {"model": "m", "data": "d", "settings": "s"}
FACTS = {
    "surroundings": {"threads": 1},
    "memory": {},
    "skipped": 0,
    "metrics": "",
    "optimizer": [],
    "scaler": None,
}


def make(folder, *steps, stands_on=STANDS_ON, state=None):
    for step in steps:
        with sealed_folder(folder / f"step-{step:06d}", {}) as temporary:
            (temporary / "model.safetensors").write_bytes(b"x" * min(step, 1000))
            facts = {**FACTS, "step": step, "stands_on": stands_on, "schedule": {"last_epoch": step}}
            (temporary / "training_state.json").write_text(json.dumps(facts if state is None else state))


def test_the_newest_is_told_by_its_number_and_not_by_its_name(tmp_path):
    make(tmp_path, 9, 999_999, 1_000_000)
    assert newest_whole(tmp_path, STANDS_ON).name == "step-1000000"


def test_damaged_ones_are_passed_over_until_a_whole_one_is_found(tmp_path):
    make(tmp_path, 1, 2, 3)
    (tmp_path / "step-000003" / "model.safetensors").write_bytes(b"xxz")
    (tmp_path / "step-000002" / "manifest.json").unlink()
    assert newest_whole(tmp_path, STANDS_ON).name == "step-000001"
    shutil.rmtree(tmp_path / "step-000001")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_whole(tmp_path, STANDS_ON)
    assert newest_whole(tmp_path / "nothing", STANDS_ON) is None


def test_what_is_not_a_checkpoint_is_neither_taken_nor_pruned(tmp_path):
    make(tmp_path, 5, 6, 7)
    for name in ("step-mine", "step-²"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-000008.tmp-1-a").mkdir()
    assert newest_whole(tmp_path, STANDS_ON).name == "step-000007"
    prune(tmp_path, keep=1, step=7)
    left = {".step-000008.tmp-1-a", "step-000007", "step-mine", "step-²"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_one_of_another_run_is_passed_over_and_one_under_another_name_too(tmp_path, caplog):
    make(tmp_path, 3)
    make(tmp_path, 5, stands_on=STANDS_ON | {"settings": "other"})
    shutil.copytree(tmp_path / "step-000003", tmp_path / "step-000009")
    with caplog.at_level("WARNING"):
        assert newest_whole(tmp_path, STANDS_ON).name == "step-000003"
    assert "it is the checkpoint of step 3" in caplog.text
    assert "the settings is not this run's" in caplog.text
    shutil.rmtree(tmp_path / "step-000003")
    with pytest.raises(UserError, match="the settings is not the one that the run was started with"):
        newest_whole(tmp_path, STANDS_ON)


def test_a_base_in_another_precision_is_named_as_that_and_not_as_another_model(tmp_path):
    """As on a machine without the GPU: its digest is another too."""
    make(tmp_path, 3, stands_on={PRECISION: "bfloat16", **STANDS_ON})
    with pytest.raises(UserError, match="the precision of the base is not the one") as refused:
        newest_whole(tmp_path, {PRECISION: "float32", **STANDS_ON, "model": "rounded"})
    assert "`model.dtype: auto` is bfloat16 on GPUs" in refused.value.hint


@pytest.mark.parametrize("state", [[], {}, {"step": 4}, None, "nonsense", 7])
def test_a_state_of_another_form_is_damage(tmp_path, state):
    make(tmp_path, 3)
    make(tmp_path, 4, state=state if state is not None else [None])
    assert newest_whole(tmp_path, STANDS_ON).name == "step-000003"


def test_what_was_passed_over_takes_no_place_of_those_that_stay(tmp_path):
    make(tmp_path, 5, 8, 11, 14)
    prune(tmp_path, keep=1, step=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000008", "step-000011", "step-000014"]


def test_the_best_ones_stay_beside_the_newest_and_take_no_place_of_these(tmp_path):
    make(tmp_path, 2, 4, 5, 8, 11)
    prune(tmp_path, keep=2, step=11, best=[4, 11, 99])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000008", "step-000011"]


@pytest.mark.parametrize("damage", ["a byte", "missing", "another run's"])
def test_a_checkpoint_that_is_not_what_this_run_saved_is_not_read(tmp_path, damage):
    make(tmp_path, 3, stands_on=STANDS_ON | ({"settings": "other"} if damage == "another run's" else {}))
    path = tmp_path / "step-000003"
    if damage == "a byte":
        (path / "model.safetensors").write_bytes(b"xxz")
    if damage == "missing":
        shutil.rmtree(path)
    with pytest.raises(DamagedFolder):
        check_whole(path, STANDS_ON)


def test_a_checkpoint_that_is_whole_is_read(tmp_path):
    make(tmp_path, 3)
    check_whole(tmp_path / "step-000003", STANDS_ON)


def test_one_of_a_version_that_digested_weights_in_another_way_is_named_as_that(tmp_path, caplog):
    now = {**STANDS_ON, "model": f"{SCHEME}m"}
    make(tmp_path, 3)
    with (
        caplog.at_level("WARNING"),
        pytest.raises(UserError, match="another version of dpo wrote the checkpoint") as no,
    ):
        newest_whole(tmp_path, now)
    assert "the version that began it" in no.value.hint and "another version" in caplog.text
    make(tmp_path, 5, stands_on={**now, "model": f"{SCHEME}other"})
    with pytest.raises(UserError, match="the model is not the one that the run was started with"):
        newest_whole(tmp_path, now)


def test_what_another_version_digested_is_compared_with_nothing(tmp_path):
    made = {**STANDS_ON, "model": f"{SCHEME}m"}
    make(tmp_path, 3)
    make(tmp_path, 5, stands_on=made)
    assert (beginning_of(tmp_path / "step-000003"), beginning_of(tmp_path / "step-000005")) == ({}, made)


def test_a_copy_of_a_checkpoint_knows_what_its_run_began_with(tmp_path):
    made = {**STANDS_ON, "model": f"{SCHEME}m"}
    make(tmp_path, 5, stands_on=made)
    copied = shutil.copytree(tmp_path / "step-000005", tmp_path / "copied")
    # An older version has not noted how the model was held.
    assert (beginning_of(copied), held_at_beginning(copied)) == (made, None)
    (copied / "manifest.json").unlink()
    assert beginning_of(copied) == made
