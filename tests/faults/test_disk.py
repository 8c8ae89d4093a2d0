"""Disks that are full, read-only, slow or broken, and folders that go away under the run.

Whatever cannot be written stops the run with exit status 1 and the last checkpoint whole; when the disk is well again,
`--resume` ends with the bytes of a run that nothing disturbed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.conftest import FULL
from tests.faults.trials import (
    Fault,
    Trial,
    change_disk,
    disk,
    judged,
    require_error,
    require_kept,
    require_said,
    require_same,
    undisturbed,
)

KIB = 1024
SPACE = "(?i)no space left"
ERRORS = {"ENOSPC": "no space left", "EDQUOT": "disk quota exceeded", "EIO": "input/output error"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("disk"), zygote, tiny_llama, demo_rows[:28])


def require_stopped(trial: Trial, whole: Trial, what: str, fault: Fault, *arguments: str) -> None:
    """Require an error, and that the run can be finished without the fault."""
    require_error(trial.train(*arguments, fault=fault), what)
    require_kept(trial)
    require_said(trial.train("--resume"))
    require_same(trial, whole)


def require_stopped_or_same(trial: Trial, whole: Trial, what: str, fault: Fault) -> None:
    """Require the same result, after an error and a resume where the fault came in the way."""
    ended = trial.train(fault=fault)
    if ended.status:
        require_error(ended, what)
        require_kept(trial)
        require_said(trial.train("--resume"))
    require_same(trial, whole)


@dataclass(frozen=True)
class Place:
    """Something that is written.

    Attributes:
        part: What its path holds.
        doing: What the error calls the writing of it.
        first: Whether it comes before training, so that a trial must not have it yet.
    """

    part: str
    doing: str
    first: bool = False


PLACES = {
    "prepared data": Place("/cache/prepared/", "preparing the data", first=True),
    "reference cache": Place("/cache/reference/", "(locking|writing) the reference cache", first=True),
    "configuration": Place("/run/.config.yaml", "preparing the output folder"),
    "environment": Place("/run/.environment.json", "preparing the output folder"),
    "facts": Place("/run/.facts.json", "writing the run's facts"),
    "metrics": Place("metrics.jsonl", "writing metrics.jsonl"),
    "held-out rows": Place("held_out.jsonl", "writing held_out.jsonl"),
    "samples": Place("samples.jsonl", "writing samples.jsonl"),
    "checkpoint": Place("/run/checkpoints/", "saving a checkpoint"),
    "final model": Place("/run/.final", "saving the trained model"),
}
REFUSED = [(name, code) for name in PLACES for code in ERRORS]


@pytest.mark.parametrize(("name", "code"), REFUSED if FULL else REFUSED[::5])
def test_a_disk_that_refuses_a_file_stops_the_run_and_names_it(tmp_path, whole, ledger, name, code):
    place = PLACES[name]
    trial = whole.another(tmp_path / "t") if place.first else whole.with_cache_only(tmp_path / "t")
    with judged(ledger, f"disk: {name} refused"):
        require_stopped(
            trial, whole, rf"{place.doing} failed: {ERRORS[code]}", ("refuse", {"part": place.part, "code": code})
        )


SIZES = [8 * KIB * 2**place for place in range(7)] + [12 * KIB * 2**place for place in range(6)]


@pytest.mark.parametrize("size", SIZES if FULL else [64 * KIB])
def test_files_of_a_limited_size_stop_the_run_or_suffice(tmp_path, whole, ledger, size):
    trial = whole.another(tmp_path / "t")
    with judged(ledger, "disk: files of a limited size"):
        require_stopped_or_same(trial, whole, "(?i)file too large", ("largest_file", {"num_bytes": size}))


def test_a_disk_that_is_full_when_the_tokenizer_is_saved_stops_the_run(tmp_path, whole, ledger):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "disk: checkpoint refused"):
        require_stopped(trial, whole, "(?i)saving a checkpoint failed: .*file too large", ("full_for_tokenizer", {}))


def space_of(trial: Trial) -> int:
    """Return what a trial's files take, in bytes, a page at least each."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in trial.folder.rglob("*"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk with room for a folder or two."""
    with disk(tmp_path / "disk", 64 * KIB) as folder:
        yield folder


@pytest.mark.parametrize("share", [place / 24 for place in range(1, 25)] if FULL else [0.45])
def test_a_full_disk_stops_the_run_until_there_is_space(small_disk, whole, ledger, share):
    """With the cache on the same disk, which so fills up in every stage of a run."""
    room = int(share * space_of(whole))
    change_disk(small_disk, f"size={room}")
    trial = whole.another(small_disk)
    with judged(ledger, "disk: full"):
        ended = trial.train()
        if ended.status:
            require_error(ended, SPACE)
            require_kept(trial)
        change_disk(small_disk, f"size={2**30}")
        require_said(trial.train("--resume"))
        require_same(trial, whole)


ROWS = [
    *(("metrics.jsonl", step) for step in range(1, 7)),
    ("held_out.jsonl", 3),
    ("held_out.jsonl", 6),
    ("samples.jsonl", 6),
]
"""Files of rows, and steps after which some are added."""


@pytest.mark.parametrize(("name", "step"), ROWS if FULL else ROWS[2:3] + ROWS[-2:-1])
def test_rows_that_cannot_be_written_stop_the_run(tmp_path, whole, ledger, name, step):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "disk: metrics refused"):
        require_stopped(trial, whole, name, ("full_file", {"name": name, "step": step}))


def test_a_new_run_in_a_read_only_folder_is_refused(small_disk, whole, ledger):
    trial = whole.with_cache_only(small_disk / "t")
    shutil.move(trial.cache, small_disk.parent / "cache")
    trial.cache.symlink_to(small_disk.parent / "cache")
    change_disk(small_disk, "ro")
    with judged(ledger, "disk: read-only"):
        require_error(trial.train(), "read-only", status=(1, 2))
        change_disk(small_disk, f"rw,size={2**30}")
        require_said(trial.train())
        require_same(trial, whole)


@pytest.mark.skipif(not FULL, reason="one of both is enough for the short bench")
def test_a_run_whose_folder_has_become_read_only_goes_on_when_it_is_writable_again(tmp_path, small_disk, whole, ledger):
    change_disk(small_disk, f"size={2**30}")
    trial = whole.unfinished(small_disk / "t")
    shutil.rmtree(trial.checkpoints / "step-000006")
    change_disk(small_disk, "ro")
    with judged(ledger, "disk: read-only"):
        require_error(trial.train("--resume"), "read-only", status=(1, 2))
        change_disk(small_disk, "rw")
        require_kept(trial)
        require_said(trial.train("--resume"), "resuming after step 4")
        require_same(trial, whole)


@pytest.mark.parametrize("code", ["EROFS", "EACCES", "EPERM"] if FULL else ["EACCES"])
@pytest.mark.parametrize("step", range(7) if FULL else [3])
def test_an_output_folder_that_refuses_from_some_step_on_stops_the_run(tmp_path, whole, ledger, code, step):
    trial = whole.with_cache_only(tmp_path / "t")
    fault = "refuse", {"part": f"{trial.run}", "code": code, "from_step": step}
    with judged(ledger, "disk: read-only"):
        require_error(trial.train(fault=fault), r"read-only|permission denied|not permitted", status=(1, 2))
        assert not trial.final.exists()
        # What could not be removed either is removed by the next run.
        require_said(trial.train("--resume"))
        require_same(trial, whole)


@pytest.mark.parametrize("step", range(1, 7) if FULL else [3])
def test_a_run_whose_folder_is_removed_stops(tmp_path, whole, ledger, step):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "disk: folder removed"):
        require_stopped(trial, whole, r"remove|replaced|gone", ("removed", {"path": str(trial.run), "step": step}))


@pytest.mark.parametrize("step", range(3, 7) if FULL else [5])
def test_a_run_whose_checkpoints_are_removed_ends_the_same(tmp_path, whole, ledger, step):
    """What was saved is gone, by the user's own hand; what comes is saved again."""
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "disk: folder removed"):
        ended = trial.train(fault=("removed", {"path": str(trial.checkpoints), "step": step}))
        require_said(ended)
        require_same(trial, whole)


@pytest.mark.parametrize("step", range(1, 7) if FULL else [2])
def test_a_run_whose_cache_is_removed_ends_the_same(tmp_path, whole, ledger, step):
    trial = whole.another(tmp_path / "t")
    with judged(ledger, "disk: folder removed"):
        require_said(trial.train(fault=("removed", {"path": str(trial.cache), "step": step})))
        require_same(trial, whole)


@pytest.mark.parametrize("step", range(1, 7) if FULL else [4])
def test_a_run_whose_metrics_are_removed_stops(tmp_path, whole, ledger, step):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "disk: folder removed"):
        fault = "removed", {"path": str(trial.run / "metrics.jsonl"), "step": step}
        require_error(trial.train(fault=fault), r"metrics.*(removed|replaced|gone)")
        require_kept(trial)


def test_a_slow_disk_only_takes_longer(tmp_path, whole, ledger):
    trial = whole.another(tmp_path / "t")
    with judged(ledger, "disk: slow"):
        require_said(trial.train(fault=("slow_flush", {"seconds": 0.01})))
        require_same(trial, whole)


@pytest.mark.parametrize("number", range(1, 71) if FULL else [20])
def test_a_disk_that_does_not_keep_what_is_written_stops_the_run(tmp_path, whole, ledger, number):
    """A flush that fails, whichever it is."""
    trial = whole.another(tmp_path / "t")
    with judged(ledger, "disk: failing flush"):
        require_stopped_or_same(trial, whole, "input/output error", ("failing_flush", {"number": number}))
