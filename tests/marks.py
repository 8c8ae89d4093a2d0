"""How a test of many cases leaves most of them to `make test-rest`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Mark the cases of a test as slow but for some that stand for all.

    Args:
        quick: Tells whether `make test` tries a case.
        cases: What `parametrize` takes.
    """
    return [case if quick(case) else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
