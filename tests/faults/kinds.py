"""The kinds of fault that tests take down, found without running them.

As a plugin of pytest (`-p tests.faults.kinds`) it prints those of the tests that are collected.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

PRINTED = "kind of fault: "
"""What stands before each."""

NAMED = re.compile(r'(?:record\(|judged\(ledger, |finish\(ledger, |kind = )(f?"[^"]+")')
"""Finds in the source of a test what it takes down."""


def kinds(test: Callable[..., object], parameters: Mapping[str, Any]) -> list[str]:
    """Return the kinds that a test takes down: the names in its source, of which its parameters may be a part."""
    return [eval(named, test.__globals__, {**parameters}) for named in NAMED.findall(inspect.getsource(test))]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Print the kinds of all tests."""
    tests = [item for item in session.items if isinstance(item, pytest.Function)]
    found = {
        kind
        for test in tests
        for kind in kinds(test.function, test.callspec.params if "callspec" in vars(test) else {})
    }
    for kind in sorted(found):
        session.config.get_terminal_writer().line(f"{PRINTED}{kind}")
