"""How long the tests wait: for what is slow on a busy machine always, for what hangs not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 600.0
"""Seconds after which what has not happened is taken never to happen; nothing that works comes near."""

_POLL_SECONDS = 0.005


def wait_until(happened: Callable[[], object], failure: Callable[[], str]) -> None:
    """Wait until something has happened.

    Args:
        happened: Tells whether it has; what it raises ends the wait.
        failure: Says what has not happened.

    Raises:
        TimeoutError: It has not happened.
    """
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(failure())
        time.sleep(_POLL_SECONDS)
