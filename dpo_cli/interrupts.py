"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 as a request to stop: at once, or at the end of the step at hand.

SIGUSR1 is what job schedulers send ahead of a time limit, SIGHUP comes when a terminal or a connection is closed.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that ask to stop."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop. Its exit status is 128 plus the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.status = 128 + signal_number


class StopSignals:
    """Turn the signals that ask to stop into `Interrupted`, at once or when it suits."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handle the signals while the context lasts; SIGHUP is let be where it is ignored, as `nohup` wants it."""
        heard = [number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a first signal, so that a step can be finished and saved; a later SIGINT stops at once.

        Other signals may come twice, from a scheduler and from a launcher that hands them on.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or number
        if self._deferring and (first or number != signal.SIGINT):
            return
        self.received = number
        raise Interrupted(number)


def ignore_signals() -> None:
    """Be asked to stop no more: the program is about to end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
