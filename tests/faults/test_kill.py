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
from tests.faults.shares import SHARDED, SHARES, SOME, thinned

NUM_KILLS = 10 if FULL else 4
"""Of each kind of run and share, but for kinds that save as others do."""

MOST_IN_A_ROW = 6


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SOME)
def test_killed_at_any_moment_as_often_as_it_takes(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    run, chance, num_kills, most = bench(name, 1), random.Random(share), 0, NUM_KILLS // thinned(name)
    started = time.monotonic()
    assert run.case().run().status == 0
    seconds, troubles = time.monotonic() - started, []
    while num_kills < most:
        case, kills = run.case(), 0
        for _ in range(min(chance.randint(1, MOST_IN_A_ROW), most - num_kills)):
            [process] = case.start("--resume")
            time.sleep(chance.uniform(0, seconds))
            process.send(signal.SIGKILL)
            # One that was quicker is finished.
            kills += case.wait([process]).status == -signal.SIGKILL
        num_kills += kills
        troubles.append(case.finish(ledger, "SIGKILL at a random moment", cases=kills))
    assert not any(troubles), "\n\n".join(filter(None, troubles))


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SHARDED)
def test_one_process_that_has_a_part_of_the_weights_is_killed_at_any_moment(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    """The other one ends by itself, names it, and `--resume` finishes the run as if nothing had happened."""
    run, chance, num_kills, most = bench(name, 2), random.Random(share), 0, NUM_KILLS // thinned(name)
    started = time.monotonic()
    assert run.case().run().status == 0
    seconds, troubles = time.monotonic() - started, []
    while num_kills < most:
        case, kills = run.case(), 0
        for _ in range(min(chance.randint(1, MOST_IN_A_ROW), most - num_kills)):
            victim, ranks = chance.randrange(2), case.start("--resume")
            time.sleep(chance.uniform(0, seconds))
            ranks[victim].send(signal.SIGKILL)
            ended = case.wait(ranks, victim, left=True)
            # One that was quicker is finished.
            kills += ended.status == -signal.SIGKILL
        num_kills += kills
        troubles.append(case.finish(ledger, f"SIGKILL of one process of two at a random moment: {name}", cases=kills))
    assert not any(troubles), "\n\n".join(filter(None, troubles))
