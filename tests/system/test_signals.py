"""SIGINT, SIGTERM, SIGHUP and SIGUSR1: at once, or when the step is done; a second SIGINT never waits."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dpo_cli.system.signals import Interrupted, StopSignals
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.program


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


BUSY = """
import contextlib, hashlib, sys, threading, time
from dpo_cli.system.signals import Interrupted, StopSignals


def say(line, ends):
    print(line, flush=True)

def announce():
    started = time.process_time()
    while time.process_time() < started + 0.1:
        time.sleep(0.01)
    print("busy", flush=True)

with contextlib.suppress(Interrupted), StopSignals(say).installed() as signals:
    signals.unsaved = lambda: 7
    with signals.deferred() if sys.argv[1] == "deferred" else contextlib.nullcontext():
        threading.Thread(target=announce, daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
"""
"""A process whose main thread computes for minutes outside of Python, as in a backward pass.

It announces itself once computing has taken time: a signal that comes before is handled between two instructions."""


@pytest.fixture
def busy(request) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", BUSY, request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "busy\n"
        yield process
        process.kill()


def answered(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal; return the line that answers while the process computes, which takes it minutes."""
    process.send_signal(number)
    return process.stdout.readline().rstrip("\n") if process.stdout else ""


@pytest.mark.parametrize("busy", ["deferred"], indirect=True)
def test_ctrl_c_is_answered_in_the_middle_of_a_long_step_and_another_ends_it(busy):
    promise = answered(busy, signal.SIGINT)
    assert promise == "stopping after this step; press Ctrl-C again to stop at once and lose 7 steps"
    assert answered(busy, signal.SIGINT) == "stopped by SIGINT"
    assert busy.wait(timeout=PATIENCE) == 130


@pytest.mark.parametrize("busy", ["deferred"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_other_signals_are_named_and_one_that_comes_twice_ends_nothing(busy, number):
    assert answered(busy, number) == f"{number.name} received: stopping after this step"
    busy.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        busy.wait(timeout=1.5)
    assert answered(busy, signal.SIGINT) == "stopped by SIGINT"
    assert busy.wait(timeout=PATIENCE) == 130


@pytest.mark.parametrize("busy", ["at once"], indirect=True)
def test_where_it_cannot_stop_at_once_it_says_so(busy):
    assert answered(busy, signal.SIGINT) == "SIGINT received: stopping; Ctrl-C ends the program at once"
    assert answered(busy, signal.SIGINT) == "stopped by SIGINT"
    assert busy.wait(timeout=PATIENCE) == 130


def test_what_is_at_hand_and_how_much_is_unsaved_are_said():
    said = []
    with StopSignals(lambda line, ends: said.append((line, ends))).installed() as signals, signals.deferred():
        signals.unsaved = lambda: 1
        with signals.during("this evaluation"):
            signal.raise_signal(signal.SIGINT)
            wait_until(lambda: said, lambda: "nothing is said")
    assert said == [("stopping after this evaluation; press Ctrl-C again to stop at once and lose 1 step", False)]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().installed() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
