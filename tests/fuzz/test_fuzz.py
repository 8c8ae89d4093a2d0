"""Whatever the program is given to read, it reads or refuses; a few inputs of each kind, the same ones every time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.targets import TARGETS, check


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused(name):
    target = TARGETS[name]

    @settings(
        max_examples=target.num_tried,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(value=target.inputs)
    def holds(value: object) -> None:
        check(target, value)

    holds()
