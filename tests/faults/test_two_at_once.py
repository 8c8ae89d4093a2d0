"""Two runs at once: on one output folder the second is refused, on one cache it waits for the first."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import FULL
from tests.faults.ledger import Outcome
from tests.faults.trials import (
    Broken,
    Gate,
    Trial,
    content,
    judged,
    require_error,
    require_no_strays,
    require_result,
    require_said,
    require_same,
    undisturbed,
)
from tests.faults.zygote import Running

CACHES = {"prepared data": "/prepared/", "reference cache": "/reference/"}
"""What the paths of each cache hold."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("two"), zygote, tiny_llama, demo_rows[:28])


@pytest.fixture
def gate(tmp_path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def neighbours(whole: Trial, folder: Path, cache: str) -> tuple[Trial, Trial]:
    """Return two trials with output folders of their own and one cache, from which one part is missing."""
    one = whole.with_cache_only(folder / "one")
    shutil.rmtree(one.cache / ("prepared" if cache == "prepared data" else "reference"))
    return one, beside(one, folder / "other")


def beside(one: Trial, folder: Path) -> Trial:
    """Return a trial elsewhere that has the same cache."""
    other = one.another(folder)
    other.cache.symlink_to(one.cache)
    return other


def held(trial: Trial, gate: Gate, cache: str) -> Running:
    """Start a run and wait until it is writing to a cache, where it stands still."""
    running = trial.start(fault=gate.at_flush(CACHES[cache]))
    gate.wait_for(running)
    return running


def require_same_cache(trial: Trial, whole: Trial) -> None:
    if content(trial.cache) != content(whole.cache):
        raise Broken(Outcome.WRONG, "another cache")
    require_no_strays(trial)


MOMENTS = ("loading", "the reference pass", "training")


@pytest.mark.parametrize("moment", MOMENTS if FULL else MOMENTS[2:])
def test_a_second_run_on_the_same_folder_is_refused(tmp_path, whole, ledger, gate, moment):
    trial = whole.another(tmp_path / "t")
    fault = gate.at_step(2) if moment == "training" else gate.at_flush(list(CACHES.values())[MOMENTS.index(moment)])
    with judged(ledger, "two at once: one output folder"):
        first = trial.start(fault=fault)
        gate.wait_for(first)
        for argument in ("--resume", "--overwrite"):
            require_error(trial.train(argument), rf"\bprocess {first.pid}\b", status=2)
        gate.open()
        require_said(first.wait())
        require_same(trial, whole)


def test_a_second_run_that_was_not_asked_to_resume_is_told_of_the_first(tmp_path, whole, ledger, gate):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "two at once: one output folder"):
        first = trial.start(fault=gate.at_step(2))
        gate.wait_for(first)
        require_error(trial.train(), rf"\bprocess {first.pid}\b", status=2)


@pytest.mark.parametrize("num_waiting", [1, 3] if FULL else [1])
@pytest.mark.parametrize("cache", CACHES)
def test_one_builds_a_cache_and_the_others_wait_and_say_so(tmp_path, whole, ledger, gate, cache, num_waiting):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, f"two at once: one {cache}"):
        builds = held(one, gate, cache)
        others = [other, *(beside(one, tmp_path / f"other-{number}") for number in range(1, num_waiting))]
        waiting = [trial.start() for trial in others]
        for running in waiting:
            running.until(f"waiting for process {builds.pid} ")
        gate.open()
        for trial, running in zip([one, *others], [builds, *waiting], strict=True):
            require_said(running.wait())
            require_same(trial, whole)
        assert waiting[0].said.count("waiting for") == 1
        require_same_cache(one, whole)


@pytest.mark.parametrize("number", range(60 if FULL else 2))
def test_whenever_two_runs_start_both_end_the_same(tmp_path, whole, ledger, number):
    """Nothing is prepared yet, and one starts a little after the other."""
    one = whole.another(tmp_path / "one")
    one.cache.mkdir()
    other = beside(one, tmp_path / "other")
    with judged(ledger, "two at once: random moments"):
        first = one.start()
        time.sleep(random.Random(number).uniform(0, 0.4))
        second = other.start()
        for trial, running in ((one, first), (other, second)):
            require_said(running.wait())
            require_same(trial, whole)
        require_same_cache(one, whole)


@pytest.mark.parametrize("cache", CACHES if FULL else ["reference cache"])
def test_a_lock_whose_holder_was_killed_stops_nobody(tmp_path, whole, ledger, gate, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder killed"):
        builds = held(one, gate, cache)
        builds.send(signal.SIGKILL)
        assert builds.wait().status == -signal.SIGKILL
        ended = other.train()
        require_said(ended)
        assert "waiting" not in ended.said
        require_same(other, whole)
        # The folder of the run that was killed had a lock, too.
        require_said(one.train("--resume"))
        require_result(one, whole)


@pytest.mark.parametrize("cache", CACHES if FULL else ["prepared data"])
def test_whoever_waits_for_one_that_is_killed_builds_the_cache(tmp_path, whole, ledger, gate, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder killed"):
        builds = held(one, gate, cache)
        waits = other.start()
        waits.until(f"waiting for process {builds.pid} ")
        builds.send(signal.SIGKILL)
        require_said(waits.wait())
        require_same(other, whole)


@pytest.mark.parametrize("cache", CACHES if FULL else ["prepared data"])
def test_what_a_killed_writer_left_in_the_cache_does_not_stay(tmp_path, whole, ledger, gate, cache):
    """The next one to hold the lock knows that nobody else is writing there."""
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder killed"):
        builds = held(one, gate, cache)
        builds.send(signal.SIGKILL)
        builds.wait()
        assert list(one.cache.rglob("*.tmp-*"))
        require_said(other.train())
        assert not list(one.cache.rglob("*.tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM] if FULL else [signal.SIGINT])
@pytest.mark.parametrize("cache", CACHES if FULL else ["reference cache"])
def test_a_holder_that_is_interrupted_lets_the_waiting_one_go_on(tmp_path, whole, ledger, gate, cache, number):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder interrupted"):
        builds = held(one, gate, cache)
        waits = other.start()
        waits.until(f"waiting for process {builds.pid} ")
        builds.send(number)
        assert builds.wait().status == 128 + number
        require_said(waits.wait())
        require_same(other, whole)
        require_same_cache(one, whole)


@pytest.mark.parametrize("cache", CACHES if FULL else ["prepared data"])
def test_who_waits_can_be_interrupted(tmp_path, whole, ledger, gate, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: waiter interrupted"):
        builds = held(one, gate, cache)
        waits = other.start()
        waits.until(f"waiting for process {builds.pid} ")
        waits.send(signal.SIGINT)
        assert waits.wait().status == 128 + signal.SIGINT
        gate.open()
        require_said(builds.wait())
        require_same(one, whole)
