"""Packages that come with an extra of this one: whether they are installed, and how they are imported."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator

from dpo_cli.errors import UserError


def missing_package(package: str, extra: str, where: str) -> UserError | None:
    """Say that a package is not installed, and which extra brings it.

    Args:
        package: The package, which is not imported.
        extra: The extra of this program that it comes with.
        where: The setting that needs it.
    """
    if importlib.util.find_spec(package) is not None:
        return None
    hint = f"install it with `pip install 'dpo-cli[{extra}]'`"
    return UserError(f"the package `{package}` is not installed", where, hint)


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
