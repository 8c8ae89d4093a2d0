"""The layers of bitsandbytes, which hold a matrix in 4 or 8 bits a weight."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator


def import_bitsandbytes() -> None:
    """Import bitsandbytes if it is installed, before PEFT does: without a look for kernels on the Hub, and silently.

    On some CPUs its first import asks the Hub for code of others, or prints that it cannot.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    with _missing("kernels"), _silent("bitsandbytes.backends.cpu.ops"):
        import bitsandbytes  # noqa: F401


@contextlib.contextmanager
def _missing(package: str) -> Iterator[None]:
    """Let a package be none that can be imported."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Let a logger say nothing but errors."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
