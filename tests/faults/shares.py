"""How the cases of the bench are shared out over tests, which processes take, and how few `make test` tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from tests.faults.conftest import FULL
from tests.faults.runs import RUNS, SHARDED_RUNS

SHARES = range(8 if FULL else 1)
"""A test takes one share of the cases."""

MOST = [name for name in RUNS if FULL or name not in ("nf4", "split", "best, saved in the background")]
"""The kinds of run but for those that `make test` need not see beside others of the kind."""

SOME = list(RUNS) if FULL else ["bco"]
"""The kinds of run for what need not be seen of all of them in `make test`."""

SHARDED = [name for name in SHARDED_RUNS if FULL or name == "shards"]
"""The kinds of run with shards, of which `make test-rest` tries one."""

_T = TypeVar("_T")


def chosen(points: Sequence[_T], share: int, every: int, few: int) -> Sequence[_T]:
    """Return a share of every so-manieth point; or, outside `make faults`, a few that are spread over all."""
    if FULL:
        return points[::every][share :: len(SHARES)]
    return [points[len(points) * (2 * place + 1) // (2 * few)] for place in range(few)]


def report(troubles: Sequence[str]) -> None:
    """Fail where there are troubles."""
    found = [trouble for trouble in troubles if trouble]
    assert not found, f"{len(found)} of {len(troubles)} cases:\n\n" + "\n\n".join(found[:5])
