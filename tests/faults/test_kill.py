"""Killed at any moment, as often as it takes, a run is finished by `--resume` as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.conftest import FULL
from tests.faults.ledger import Ledger
from tests.faults.runs import Bench
from tests.faults.shares import SHARDED, SHARES, SOME, report, thinned

NUM_KILLS = 3 if FULL else 4
"""Of each kind of run and share; of kinds that save as others do, one."""


def kill_again_and_again(run: Bench, ledger: Ledger, kind: str, share: int, most: int) -> None:
    """Kill one process of runs, several times in a row maybe, and let each be finished."""
    chance, before = random.Random(share), run.zygote.cpu_seconds()
    assert run.case().run().status == 0
    cpu_seconds = (run.zygote.cpu_seconds() - before) / run.num_ranks
    num_kills, troubles = 0, []
    while num_kills < most:
        case, kills = run.case(), 0
        for _ in range(chance.randint(1, most - num_kills)):
            victim, ranks = chance.randrange(run.num_ranks), case.start("--resume")
            killed = ranks[victim].kill_after(chance.uniform(0, cpu_seconds))
            case.wait(ranks, victim, left=True)
            # One that was quicker is finished.
            if not killed:
                break
            kills += 1
        num_kills += kills
        troubles.append(case.finish(ledger, kind, cases=kills))
    report(troubles)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SOME)
def test_killed_at_any_moment_as_often_as_it_takes(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    kind = f"SIGKILL at a random moment: {name}"
    kill_again_and_again(bench(name, 1), ledger, kind, share, 1 if thinned(name) > 1 else NUM_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SHARDED)
def test_one_process_that_has_a_part_of_the_weights_is_killed_at_any_moment(
    bench: Callable[[str, int], Bench], ledger: Ledger, name: str, share: int
) -> None:
    """The other one ends by itself, names it, and `--resume` finishes the run as if nothing had happened."""
    kind = f"SIGKILL of one process of two at a random moment: {name}"
    kill_again_and_again(bench(name, 2), ledger, kind, share, 1 if thinned(name) > 1 else NUM_KILLS)
