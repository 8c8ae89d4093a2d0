"""Worker processes: results in order, errors that are seen, no process left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal

import pytest

from dpo_cli.errors import FAILED, UserError
from dpo_cli.system.workers import _Workers, in_order

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
    return item, os.getpid()


@pytest.fixture(autouse=True)
def _waiting(patient_workers: None) -> None:
    """Let the second item wait until the workers are there."""


def ends(*last: int):
    return in_order(work, [0, 1, *last], num_workers=2, num_alone=1)


def test_results_come_in_order_from_here_and_from_the_workers():
    found = list(ends(100, 101, 903, 102))
    assert [item for item, _ in found] == [0, 1, 100, 101, 903, 102]
    assert found[0][1] == found[1][1] == os.getpid()
    assert len({process for _, process in found} - {os.getpid()}) == 2
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        (900, UserError, "a row is bad"),
        (901, RuntimeError, "ValueError: a defect"),
        (902, UserError, "a worker process ended"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_an_ordinary_error(item, kind, words):
    with pytest.raises(kind, match=words) as caught:
        list(ends(item, *range(100, 110)))
    assert getattr(caught.value, "status", FAILED) == (2 if item == 900 else FAILED)
    assert not multiprocessing.active_children()


def test_few_items_start_no_process(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", None)
    assert [item for item, _ in in_order(work, range(20), num_workers=2, num_alone=20)] == [*range(20)]
    assert {process for _, process in in_order(work, range(9), num_workers=1, num_alone=0)} == {os.getpid()}
    assert not multiprocessing.active_children()


def test_who_stops_listening_ends_the_workers():
    results = ends(2, 3, 4)
    assert next(results)[0] == 0
    assert next(results)[0] == 1
    assert next(results)[0] == 2
    results.close()
    assert not multiprocessing.active_children()


def test_who_has_no_item_left_does_not_wait_for_a_worker(monkeypatch):
    monkeypatch.setattr(_Workers, "map", None)
    monkeypatch.setattr(_Workers, "have_started", lambda workers: False)
    assert [item for item, _ in ends(2)] == [0, 1, 2]
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_be_started_is_an_error_and_no_endless_wait(monkeypatch):
    start_one = _Workers._start_one

    def refuse_the_second(workers, context):
        if workers._processes:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start_one(workers, context)

    monkeypatch.setattr(_Workers, "_start_one", refuse_the_second)
    with pytest.raises(UserError, match="worker processes cannot be started"):
        list(ends(*range(100, 110)))
    assert not multiprocessing.active_children()
