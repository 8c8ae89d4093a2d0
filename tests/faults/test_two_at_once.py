"""Two runs at once: on one output folder one is refused, on one cache one waits for the other."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from dpo_cli.locks import locked
from tests.faults.conftest import FULL
from tests.faults.ledger import Outcome
from tests.faults.trials import (
    Broken,
    Fault,
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

SLOW: dict[str, tuple[Fault, str]] = {
    "prepared data": (("slow_flush", {"seconds": 0.5, "part": "/prepared/"}), "preparing "),
    "reference cache": (("slow_flush", {"seconds": 1.0, "part": "/reference/"}), "reference log-probabilities: "),
}
"""What makes the writing of each cache take its time, and what is said before."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("two"), zygote, tiny_llama, demo_rows[:28])


def neighbours(whole: Trial, folder: Path, cache: str) -> tuple[Trial, Trial]:
    """Return two trials with output folders of their own and one cache, from which one part is missing."""
    one = whole.with_cache_only(folder / "one")
    shutil.rmtree(one.cache / ("prepared" if cache == "prepared data" else "reference"))
    other = whole.another(folder / "other")
    other.cache.symlink_to(one.cache)
    return one, other


def require_both_same(one: Trial, other: Trial, whole: Trial) -> None:
    for trial in (one, other):
        require_same(trial, whole)
    require_same_cache(one, whole)


def require_same_cache(trial: Trial, whole: Trial) -> None:
    if content(trial.cache) != content(whole.cache):
        raise Broken(Outcome.WRONG, "another cache")
    require_no_strays(trial)


MOMENTS = {"loading": "loading", "the reference pass": "reference log-probabilities: ", "a step": "step 2/"}


@pytest.mark.parametrize("arguments", [(), ("--resume",), ("--overwrite",)], ids=" ".join)
@pytest.mark.parametrize("moment", MOMENTS if FULL else ["a step"])
def test_a_second_run_on_the_same_folder_is_refused(tmp_path, whole, ledger, moment, arguments):
    trial = whole.another(tmp_path / "t")
    with judged(ledger, "two at once: one output folder"):
        first = trial.start(fault=("slow_steps", {"seconds": 0.3}))
        first.until(MOMENTS[moment])
        second = trial.train(*arguments)
        assert first.runs
        require_error(second, rf"\b{first.pid}\b", status=2)
        require_said(first.wait())
        require_same(trial, whole)


@pytest.mark.parametrize("cache", SLOW)
def test_one_builds_a_cache_and_the_other_waits_and_says_so(tmp_path, whole, ledger, cache):
    one, other = neighbours(whole, tmp_path, cache)
    fault, begins = SLOW[cache]
    with judged(ledger, f"two at once: one {cache}"):
        builds = one.start(fault=fault)
        builds.until(begins)
        time.sleep(0.1)
        waits = other.start()
        require_said(waits.wait(), rf"waiting for process {builds.pid}\b")
        require_said(builds.wait())
        require_both_same(one, other, whole)


@pytest.mark.parametrize("number", range(60 if FULL else 3))
def test_whenever_two_runs_start_both_end_the_same(tmp_path, whole, ledger, number):
    """Nothing is prepared yet, and one starts a little after the other."""
    one, other = whole.another(tmp_path / "one"), whole.another(tmp_path / "other")
    one.cache.mkdir()
    other.cache.symlink_to(one.cache)
    with judged(ledger, "two at once: random moments"):
        first = one.start()
        time.sleep(random.Random(number).uniform(0, 0.4))
        second = other.start()
        require_said(first.wait())
        require_said(second.wait())
        require_both_same(one, other, whole)


@pytest.mark.parametrize("cache", SLOW if FULL else ["prepared data"])
def test_three_take_turns(tmp_path, whole, ledger, cache):
    one, other = neighbours(whole, tmp_path, cache)
    third = whole.another(tmp_path / "third")
    third.cache.symlink_to(one.cache)
    with judged(ledger, f"two at once: one {cache}"):
        runs = [trial.start(fault=SLOW[cache][0]) for trial in (one, other, third)]
        for run in runs:
            require_said(run.wait())
        require_both_same(one, other, whole)
        require_same(third, whole)


@pytest.mark.parametrize("cache", SLOW)
def test_a_lock_whose_holder_was_killed_stops_nobody(tmp_path, whole, ledger, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder killed"):
        fault, begins = SLOW[cache]
        builds = one.start(fault=fault)
        builds.until(begins)
        time.sleep(0.2)
        builds.send(signal.SIGKILL)
        assert builds.wait().status == -signal.SIGKILL
        ended = other.train()
        require_said(ended)
        assert "waiting" not in ended.said
        require_same(other, whole)
        # The folder of the run that was killed had a lock, too.
        require_said(one.train("--resume"))
        require_result(one, whole)


@pytest.mark.parametrize("cache", SLOW)
def test_what_a_killed_writer_left_in_the_cache_does_not_stay(tmp_path, whole, ledger, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder killed"):
        # The next run waits until nobody writes there, so that nothing unfinished can be anybody's.
        assert one.train(fault=("killed_at_flush", {"part": SLOW[cache][0][1]["part"]})).status == -signal.SIGKILL
        assert list(one.cache.rglob("*.tmp-*"))
        require_said(other.train())
        require_same_cache(one, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM] if FULL else [signal.SIGINT])
@pytest.mark.parametrize("cache", SLOW)
def test_a_holder_that_is_interrupted_lets_the_waiting_one_go_on(tmp_path, whole, ledger, cache, number):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: holder interrupted"):
        fault, begins = SLOW[cache]
        builds = one.start(fault=fault)
        builds.until(begins)
        waits = other.start()
        waits.until(f"waiting for process {builds.pid}")
        builds.send(number)
        assert builds.wait().status == 128 + number
        require_said(waits.wait())
        require_same(other, whole)
        require_same_cache(one, whole)


@pytest.mark.parametrize("cache", SLOW if FULL else ["prepared data"])
def test_who_waits_can_be_interrupted(tmp_path, whole, ledger, cache):
    one, other = neighbours(whole, tmp_path, cache)
    with judged(ledger, "two at once: waiter interrupted"):
        fault, begins = SLOW[cache]
        builds = one.start(fault=fault)
        builds.until(begins)
        waits = other.start()
        waits.until(f"waiting for process {builds.pid}")
        waits.send(signal.SIGINT)
        assert waits.wait(timeout=5).status == 130
        require_said(builds.wait())
        require_same(one, whole)


def count_up(file: Path, times: int) -> None:
    """Add to a number in a file, in two movements that only a lock keeps together."""
    for _ in range(times):
        with locked(file.with_name(".lock"), lambda holder: None):
            number = int(file.read_text())
            time.sleep(random.uniform(0, 0.001))
            file.write_text(str(number + 1))


def test_one_at_a_time_holds_a_lock_however_many_want_it(tmp_path, ledger):
    """Whoever lets go of it removes its file, which the next may have opened already."""
    file, num_processes, times = tmp_path / "number", 4, 200 if FULL else 40
    file.write_text("0")
    context = multiprocessing.get_context("spawn")
    with judged(ledger, "two at once: a lock"):
        processes = [context.Process(target=count_up, args=(file, times)) for _ in range(num_processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        if int(file.read_text()) != num_processes * times:
            raise Broken(Outcome.WRONG, "two held the lock at once")
        assert [path.name for path in tmp_path.iterdir()] == ["number"]
