"""Killed at any moment, as often as it takes, a run is finished by `--resume` as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import FULL
from tests.faults.ledger import Ledger
from tests.faults.runs import Bench
from tests.faults.shares import SHARES, SOME

NUM_KILLS = 10 if FULL else 4
"""Of each kind of run and share."""

MOST_IN_A_ROW = 6


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SOME)
def test_killed_at_any_moment_as_often_as_it_takes(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    run, chance, num_kills = bench(name, 1), random.Random(share), 0
    started = time.monotonic()
    assert run.case().run().status == 0
    seconds = time.monotonic() - started
    troubles = []
    while num_kills < NUM_KILLS:
        case, kills = run.case(), 0
        for _ in range(min(chance.randint(1, MOST_IN_A_ROW), NUM_KILLS - num_kills)):
            [process] = case.start("--resume")
            time.sleep(chance.uniform(0, seconds))
            process.send(signal.SIGKILL)
            # One that was quicker is finished.
            kills += case.wait([process]).status == -signal.SIGKILL
        num_kills += kills
        troubles.append(case.finish(ledger, "SIGKILL at a random moment", cases=kills))
    assert not any(troubles), "\n\n".join(filter(None, troubles))
