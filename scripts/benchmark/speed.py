"""How fast the machine is while a run is under way: the run is held, matrices are multiplied, it goes on.

A machine that is shared with others is a third faster or slower from one minute to the next. Its speed before and
after a run says little of the minutes between.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN = 10.0
"""How long a process runs from one pause to the next; half of it to the first."""

LONGEST_SECONDS = 120.0
"""How long multiplying may take."""


class GaugeFailed(Exception):
    """The machine's speed could not be measured."""


@dataclass(frozen=True)
class Pause:
    """A time in which a run was held, in seconds of the monotonic clock, and the machine's speed in it."""

    began: float
    ended: float
    gflops: float


class Gauge:
    """A process that multiplies matrices when it is asked, and waits meanwhile.

    Args:
        environment: Of the process: as many threads as the runs have.
        device: What multiplies, `cpu` or `cuda`.
    """

    def __init__(self, environment: dict[str, str], device: str = "cpu") -> None:
        command = [sys.executable, str(Path(__file__).with_name("products.py")), device]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def __enter__(self) -> Gauge:
        # What it imports first must not be measured as part of a run.
        self()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self) -> float:
        """Return the speed of matrix products in GFLOP/s: float32 on a CPU, bfloat16 on a GPU.

        Raises:
            GaugeFailed: The process is gone, or does not answer.
        """
        try:
            print(file=self._process.stdin, flush=True)
            if select.select([self._process.stdout], [], [], LONGEST_SECONDS)[0]:
                return float(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise GaugeFailed("the process that measures the speed of matrix products is gone") from error
        raise GaugeFailed("the process that measures the speed of matrix products does not answer")


class Holder:
    """Hold a process every few seconds, and measure the machine's speed meanwhile; end it where that fails.

    Args:
        process: Its id. It must not be waited for before `end` returns: the id could be another's by then.
        measure: Returns the speed in GFLOP/s.
    """

    def __init__(self, process: int, measure: Callable[[], float]) -> None:
        self._process, self._measure = process, measure
        self._pauses: list[Pause] = []
        self._failed: Exception | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin, if that was not done before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._hold, daemon=True)
            self._thread.start()

    def end(self) -> list[Pause]:
        """Let the process go on and return the pauses.

        Raises:
            GaugeFailed: The speed could not be measured.
        """
        self._over.set()
        if self._thread:
            self._thread.join()
        if self._failed:
            raise self._failed
        return self._pauses

    def _hold(self) -> None:
        seconds = SECONDS_BETWEEN / 2
        while not self._over.wait(seconds):
            began = time.monotonic()
            os.kill(self._process, signal.SIGSTOP)
            try:
                gflops = self._measure()
            except GaugeFailed as error:
                self._failed = error
                os.kill(self._process, signal.SIGKILL)
                return
            finally:
                os.kill(self._process, signal.SIGCONT)
            self._pauses.append(Pause(began, time.monotonic(), gflops))
            seconds = SECONDS_BETWEEN
