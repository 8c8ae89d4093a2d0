"""Worker processes: results in order, errors that are seen, no process left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.context import SpawnProcess

import psutil
import pytest

from dpo_cli.errors import FAILED, UserError
from dpo_cli.system import workers
from dpo_cli.system.workers import in_order
from tests.conftest import ROOT

pytestmark = pytest.mark.program


def work(item: int) -> tuple[int, int]:
    if item == 900:
        raise UserError("a row is bad", "rows.jsonl:900")
    if item == 901:
        raise ValueError("a defect")
    if item == 902 and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 903 and multiprocessing.parent_process():
        os.kill(os.getpid(), signal.SIGINT)
    if item >= 100:
        time.sleep(0.1)  # Another worker takes the next.
    return item, os.getpid()


@pytest.fixture(autouse=True)
def _waiting(patient_workers: None) -> None:
    """Let the second item wait until the workers are there."""


def ends(*last: int):
    return in_order(work, [0, 1, *last], num_workers=2, seconds_alone=0)


def test_results_come_in_order_from_here_and_from_the_workers():
    found = list(ends(100, 101, 903, 102))
    assert [item for item, _ in found] == [0, 1, 100, 101, 903, 102]
    assert found[0][1] == os.getpid()
    assert len({process for _, process in found} - {os.getpid()}) == 2
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        (900, UserError, "a row is bad"),
        (901, ValueError, "a defect"),
        (902, UserError, "a worker process ended"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_an_ordinary_error(item, kind, words):
    with pytest.raises(kind, match=words) as caught:
        list(ends(item, *range(100, 110)))
    assert getattr(caught.value, "status", FAILED) == (2 if item == 900 else FAILED)
    assert not multiprocessing.active_children()


def test_a_defect_in_a_worker_shows_where_it_is():
    with pytest.raises(ValueError, match="a defect") as caught:
        list(ends(901))
    assert 'raise ValueError("a defect")' in "".join(traceback.format_exception(caught.value))


def test_little_work_starts_no_process(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", None)
    assert [item for item, _ in in_order(work, range(20), num_workers=2, seconds_alone=60)] == [*range(20)]
    assert {process for _, process in in_order(work, range(9), num_workers=1, seconds_alone=0)} == {os.getpid()}
    assert not multiprocessing.active_children()


def test_items_are_read_when_they_are_needed():
    read = []
    results = in_order(work, (read.append(item) or item for item in range(50)), num_workers=2, seconds_alone=0)
    for num_results in range(1, 51):
        next(results)
        assert len(read) <= num_results + 3
    assert list(results) == []


def test_who_stops_listening_ends_the_workers():
    results = ends(2, 3, 4)
    assert next(results)[0] == 0
    assert next(results)[0] == 1
    assert next(results)[0] == 2
    results.close()
    assert not multiprocessing.active_children()


def test_who_has_no_item_left_does_not_wait_for_a_worker(monkeypatch):
    monkeypatch.setattr(workers, "_result", None)
    monkeypatch.setattr(workers, "_have_started", lambda starting: False)
    assert [item for item, _ in ends(2)] == [0, 1, 2]
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_be_started_is_an_error_and_no_endless_wait(monkeypatch):
    start, num_started = SpawnProcess.start, []

    def refuse_the_second(process):
        if num_started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        num_started.append(1)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", refuse_the_second)
    with pytest.raises(UserError, match="worker processes cannot be started"):
        list(ends(*range(100, 110)))
    assert not multiprocessing.active_children()


def test_workers_end_with_a_process_that_was_killed(tmp_path):
    script = """
import os, signal
from dpo_cli.system.workers import in_order
from tests.system.test_workers import work

if __name__ == "__main__":
    for _, process in in_order(work, range(10**6), num_workers=2, seconds_alone=0):
        if process != os.getpid():
            print(process, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=120, check=False)
    # Standard output closes when the last process that has it ends.
    worker = int(found.stdout.split()[0])
    assert found.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
