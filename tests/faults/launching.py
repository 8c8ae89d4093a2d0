"""Start several processes of one run, as a launcher does."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from tests.faults.zygote import Ended, Running, Zygote

Fault = tuple[str, Mapping[str, Any]]


_PORTS = range(10_000, 32_768)
"""Those that no system gives to whoever asks for any, so that none is taken before the run takes it."""


def free_port() -> int:
    """Return a port at which the processes of a run can find each other."""
    while True:
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", random.SystemRandom().choice(_PORTS)))
            return int(found.getsockname()[1])


def start_ranks(
    zygote: Zygote,
    num_ranks: int,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    faults: Mapping[int, Fault] | None = None,
) -> list[Running]:
    """Start `dpo` with some arguments in several processes that find each other.

    Args:
        zygote: Forks them.
        num_ranks: How many.
        arguments: Those of the command line, the same for all.
        env: More environment variables.
        faults: What goes wrong, by rank.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks), **(env or {})}
    return [
        zygote.start(
            *arguments, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, fault=(faults or {}).get(rank)
        )
        for rank in range(num_ranks)
    ]


def run_ranks(zygote: Zygote, num_ranks: int, *arguments: object, **more: Any) -> Ended:
    """Run `dpo` to its end in one process or several; return the first of them that failed, else the main one."""
    if num_ranks == 1:
        return zygote.run(*arguments, **more)
    return _worst([rank.wait() for rank in start_ranks(zygote, num_ranks, *arguments, **more)])


def _worst(ended: Sequence[Ended]) -> Ended:
    return next((one for one in ended if one.status), ended[0])
