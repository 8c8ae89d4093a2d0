"""How the cases of the bench are divided over the rounds of `make faults`, and how few `make test` tries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from tests.faults.conftest import FULL
from tests.faults.runs import RUNS, SHARDED_RUNS
from tests.faults.zygote import ROUND

ROUNDS = 8
"""After so many every case has been tried; one takes less than an hour on two cores."""

_NUM_SHARES = 4 * ROUNDS

SHARES = range(int(os.environ[ROUND]) - 1, _NUM_SHARES, ROUNDS) if FULL else range(1)
"""A test takes one share of the cases: one of four of the round, so that little is lost of what is broken off."""

MOST = [name for name in RUNS if FULL or name not in ("nf4", "split", "best, saved in the background")]
"""The kinds of run but for those that `make test` need not see beside others of the kind."""

SOME = list(RUNS) if FULL else ["bco"]
"""The kinds of run for what need not be seen of all of them in `make test`."""

SHARDED = [name for name in SHARDED_RUNS if FULL or name == "shards"]
"""The kinds of run with shards, of which `make test-rest` tries one."""

_ALIKE = {"dpo", "nf4", "best, saved in the background", *SHARDED_RUNS} - {"shards"}

_T = TypeVar("_T")


def thinned(name: str) -> int:
    """Return 4 for a kind of run that saves as others do, of which every fourth point is tried; else 1.

    `bco` saves what `dpo` does and more, `nf4` an adapter as `lora`; the last two options are tried one by one. Of the
    kinds with shards, each has what one of these has.
    """
    return 4 if name in _ALIKE else 1


def chosen(points: Sequence[_T], share: int, every: int, few: int) -> Sequence[_T]:
    """Return a share of every so-manieth point; or, outside `make faults`, a few that are spread over all."""
    if FULL:
        return points[::every][share::_NUM_SHARES]
    return [points[len(points) * (2 * place + 1) // (2 * few)] for place in range(few)]


def report(troubles: Sequence[str]) -> None:
    """Fail where there are troubles."""
    found = [trouble for trouble in troubles if trouble]
    assert not found, f"{len(found)} of {len(troubles)} cases:\n\n" + "\n\n".join(found[:5])
