"""SIGINT, SIGTERM, SIGHUP and SIGUSR1: at once, or when the step is done; a second SIGINT never waits."""

from __future__ import annotations

import signal

import pytest

from dpo_cli.interrupts import Interrupted, StopSignals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_at_once_unless_it_is_deferred(number, status):
    with StopSignals().installed() as signals:
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(number)
        assert caught.value.status == status
        assert str(caught.value) == f"stopped by {number.name}"
        assert signals.received == number


def test_a_deferred_signal_is_noted_and_a_later_ctrl_c_stops_at_once():
    with StopSignals().installed() as signals, signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught.value.status == 130


def test_a_scheduler_and_a_launcher_may_both_hand_on_the_same_signal():
    with StopSignals().installed() as signals, signals.deferred():
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGUSR1


def test_the_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().installed() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
