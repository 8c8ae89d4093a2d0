"""Bounds on time and memory for code that is not the program's own, or reads what nobody has looked at.

Both are the operating system's: they hold inside of a single operation, as no count of steps would. Where a system
does not have them, or in a thread that signals do not reach, nothing is bounded.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_MEMORY = Path("/proc/self/statm")
_DATA_PAGES = 5


class TookTooLong(Exception):
    """Code ran for longer than it was given."""


@contextlib.contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Stop what runs within after so many seconds of the processor's time.

    Raises:
        TookTooLong: It was stopped.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _stop)
    # Libraries may have the garbage collector call them, and an exception that is raised in such a call is lost: what
    # runs within would go on without an end.
    collects = gc.isenabled()
    gc.disable()
    try:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            yield
        finally:
            # An alarm that comes right here still leaves everything as it was.
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, previous)
        if collects:
            gc.enable()


@contextlib.contextmanager
def bounded_memory(num_bytes: int) -> Iterator[None]:
    """Refuse memory to what runs within once the process has so much more than it has now.

    Raises:
        MemoryError: It asked for more; Arrow has an error of its own, which is one too.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(_MEMORY.read_text().split()[_DATA_PAGES])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _stop(number: int, frame: FrameType | None) -> None:
    raise TookTooLong
