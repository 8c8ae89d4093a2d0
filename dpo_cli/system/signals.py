"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 as a request to stop: at once, or at the end of the step at hand.

SIGUSR1 is what job schedulers send ahead of a time limit, SIGHUP comes when a terminal or a connection is closed.

Python calls a handler between two instructions of the main thread, which may be in a backward pass for minutes. So a
thread reads of every signal through the wakeup descriptor, as it comes, and answers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from dpo_cli.system.text import several

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The signals that ask to stop."""

_PATIENCE_SECONDS = 0.5
"""How long the main thread may take to stop at once, before a line says that it will or the process is ended."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop. Its exit status is 128 plus the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.status = 128 + signal_number


class StopSignals:
    """Turn the signals that ask to stop into `Interrupted`, at once or when it suits.

    Args:
        say: Prints an answer; called with a line and whether the process ends with it.

    Attributes:
        received: The first signal that came, or None.
        at_hand: What is finished before a deferred signal stops the run.
        unsaved: Returns how many finished steps would be lost if the run stopped at once.
    """

    def __init__(self, say: Callable[[str, bool], None] = lambda line, ends: None) -> None:
        self.received: int | None = None
        self.at_hand = "this step"
        self.unsaved: Callable[[], int] = lambda: 0
        self._say = say
        self._deferring = self._raised = False
        self._num_handled = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handle the signals while the context lasts; SIGHUP stays ignored where it is, as `nohup` wants it."""
        heard = [number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        with self._answered():
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

    @contextlib.contextmanager
    def during(self, at_hand: str) -> Iterator[None]:
        """Name what is finished before the run stops, while the context lasts."""
        before, self.at_hand = self.at_hand, at_hand
        try:
            yield
        finally:
            self.at_hand = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._num_handled += 1
        first, self.received = self.received is None, self.received or number
        if self._deferring and (first or number != signal.SIGINT):
            return
        self.received, self._raised = number, True
        raise Interrupted(number)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Let a thread answer the signals while the context lasts."""
        read, written = socket.socketpair()
        written.setblocking(False)
        before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._answer, args=(read,), name="answers to signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            written.close()
            thread.join(_PATIENCE_SECONDS)

    def _answer(self, signals: socket.socket) -> None:
        """Answer one signal after the other."""
        first = True
        with signals:
            while True:
                num_handled = self._num_handled
                try:
                    number = signals.recv(1)
                except TimeoutError:
                    continue
                if not number:
                    return
                if number[0] in STOPPING:
                    self._answer_to(signal.Signals(number[0]), num_handled, first=first)
                    first = False
                    # From now on the number above must not be an old one.
                    signals.settimeout(_PATIENCE_SECONDS / 10)

    def _answer_to(self, number: signal.Signals, num_handled: int, *, first: bool) -> None:
        """Say what follows from a signal; end the process at a second SIGINT that the main thread does not handle.

        Args:
            number: The signal.
            num_handled: How many the main thread had handled before it came.
            first: Whether it is the first.
        """
        if self._deferring and first:
            self._say(self._promise(number), False)
        elif first or number == signal.SIGINT:
            until = time.monotonic() + _PATIENCE_SECONDS
            while not (handled := self._raised or self._num_handled > num_handled) and time.monotonic() < until:
                time.sleep(_PATIENCE_SECONDS / 50)
            if handled:
                return
            if first:
                self._say(f"{number.name} received: stopping; Ctrl-C ends the program at once", False)
            else:
                _end(Interrupted(number), self._say)

    def _promise(self, number: signal.Signals) -> str:
        """Say when the run stops that was asked to, and what it would cost to stop at once."""
        if number != signal.SIGINT:
            return f"{number.name} received: stopping after {self.at_hand}"
        num_steps = self.unsaved()
        lost = several(num_steps, "step") if num_steps else "this step"
        return f"stopping after {self.at_hand}; press Ctrl-C again to stop at once and lose {lost}"


def _end(stop: Interrupted, say: Callable[[str, bool], None]) -> None:
    """End the process, whatever its main thread computes. What is on the disk is whole at any moment."""
    # A line may wait for a pipe that nobody reads.
    last_resort = threading.Timer(_PATIENCE_SECONDS, os._exit, (stop.status,))
    last_resort.daemon = True
    last_resort.start()
    say(str(stop), True)
    os._exit(stop.status)


def ignore_signals() -> None:
    """Ignore requests to stop from now on: the program is about to end."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
