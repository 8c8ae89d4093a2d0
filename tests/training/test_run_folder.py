"""The output folder: what it holds decides what is said, also where the disk lets nobody lock it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dpo_cli.errors import UserError
from dpo_cli.system.storage import sealed_folder
from dpo_cli.training import run_folder
from dpo_cli.training.recorded_settings import RESOLVED
from dpo_cli.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(RESOLVED)
    folder.checkpoints.mkdir()
    return folder


def test_who_is_at_work_is_told_before_what_to_do(folder):
    with folder.locked():
        refusal = folder.check(resume=False, overwrite=False)
    assert "another run is writing" in str(refusal)
    assert "the output folder contains another run" in str(folder.check(resume=False, overwrite=False))


def test_a_folder_that_cannot_be_locked_is_told_for_what_it_holds(folder, monkeypatch):
    def refuse(*arguments):
        raise UserError("locking the output folder failed: permission denied")

    monkeypatch.setattr(run_folder, "locked", refuse)
    refusal = folder.check(resume=False, overwrite=False)
    assert "the output folder contains another run" in str(refusal)
    assert "`--resume`" in str(refusal)
    with pytest.raises(UserError, match="permission denied"), folder.locked():
        pass


@pytest.mark.parametrize("name", ["final", "checkpoints", "trackers"])
def test_overwrite_leaves_what_a_link_leads_to(folder, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    link = getattr(folder, name)
    if link.exists():
        link.rmdir()
    link.symlink_to(tmp_path / "elsewhere")
    refusal = folder.check(resume=False, overwrite=True)
    assert str(tmp_path / "elsewhere") in str(refusal)
    assert refusal.where == str(link)
    assert folder.check(resume=True, overwrite=False) is None


MAKES_AND_REMOVES = """
import sys, time
from pathlib import Path
folder, end = Path(sys.argv[1]), time.monotonic() + 3
while time.monotonic() < end:
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".lock").unlink()
    folder.rmdir()
"""


@pytest.mark.program
def test_a_rank_that_looks_while_another_makes_the_folder_finds_nothing_wrong(tmp_path):
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", MAKES_AND_REMOVES, run]) as other:
        while other.poll() is None:
            assert RunFolder(run).check(resume=False, overwrite=False) is None


def test_of_a_finished_run_what_a_crash_left_of_its_page_is_removed(tmp_path):
    run = RunFolder(tmp_path / "run")
    with sealed_folder(run.final, {}) as final:
        (final / "model.safetensors").write_bytes(b"weights")
    stray = run.report.with_name(f".{run.report.name}.tmp-0a1b2c3d")
    for file in (run.report, stray):
        file.write_text("a page")
    assert "is finished" in run.nothing_left({}, extend=False)[0]
    assert run.report.exists() and not stray.exists()


def test_settings_that_a_finished_run_was_not_trained_with_are_named_with_what_to_do(tmp_path):
    run = RunFolder(tmp_path / "run")
    with sealed_folder(run.final, {}) as final:
        (final / "model.safetensors").write_bytes(b"weights")
    run.config.write_text(f"{RESOLVED}evaluation: {{best_by: null, samples: 4}}\ntraining: {{epochs: 1.0}}\n")
    now = {"evaluation": {"best_by": "loss", "samples": 4}, "training": {"epochs": 2.0}, "output_dir": "elsewhere"}
    finished, changed = run.nothing_left(now, extend=False)
    assert "is finished" in finished
    assert "settings of a finished run cannot change: `evaluation.best_by` was null and is loss;" in changed
    assert "`--overwrite`" in changed
    assert not any(name in changed for name in ("`training.epochs`", "`evaluation.samples`", "elsewhere"))
    same = {**now, "evaluation": {"best_by": None, "samples": 4}}
    assert len(run.nothing_left(same, extend=False)) == 1


def test_a_file_in_the_place_of_the_folder_is_no_damaged_run(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunFolder(tmp_path / "file")
    assert run.damage() is None
    assert "the output folder is a file" in str(run.check(resume=True, overwrite=False))
