"""SIGINT and SIGTERM: at once, or when the step is done; a second one never waits."""

from __future__ import annotations

import signal

import pytest

from dpo_cli.interrupts import Interrupted, StopSignals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once_unless_it_is_deferred(number, status):
    with StopSignals().installed() as signals:
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(number)
        assert caught.value.status == status
        assert str(caught.value) == f"stopped by {number.name}"
        assert signals.received == number


def test_a_deferred_signal_is_noted_and_a_second_one_stops_at_once():
    with StopSignals().installed() as signals, signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
