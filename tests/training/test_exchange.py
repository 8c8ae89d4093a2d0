"""Processes that meet in a store read what was told in this meeting, not what is left of others."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from dpo_cli.training import exchange

WAIT = timedelta(seconds=30)


@pytest.fixture
def process(monkeypatch):
    """Return what begins a process that is started in an attempt of the launcher; the store outlives it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))

    def begin(attempt):
        monkeypatch.setattr(exchange, "_meetings", type(exchange._meetings)(exchange._meetings.default_factory))
        if attempt is None:
            monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        else:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))

    begin(None)
    yield begin
    del store


def test_processes_that_ask_as_often_meet(process):
    first = [exchange.meeting(purpose, WAIT) for purpose in ("ranks", "found", "ranks")]
    for number, store in enumerate(first):
        store.set("0", str(number))
    process(0)
    # Who asks in another order for other purposes meets them too.
    second = [exchange.meeting(purpose, WAIT) for purpose in ("found", "ranks", "ranks")]
    assert [store.get("0") for store in second] == [b"1", b"0", b"2"]


@pytest.mark.parametrize("before", [None, 0])
def test_a_process_that_is_started_again_reads_no_farewell_of_the_attempt_before(process, before):
    process(before)
    exchange.meeting("ranks", WAIT).set("0", "farewell")
    process(1)
    assert not exchange.meeting("ranks", WAIT).check(["0"])


def test_a_second_run_of_a_process_reads_no_farewell_of_its_first(process):
    exchange.meeting("ranks", WAIT).set("0", "farewell")
    assert not exchange.meeting("ranks", WAIT).check(["0"])
