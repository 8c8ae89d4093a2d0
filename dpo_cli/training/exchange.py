"""What the processes of a run tell each other through the store by which they found each other, and nothing else."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

_LONGEST_SECONDS = 7200.0
"""Who waits for whom, and for how long, is the caller's to say."""
_meetings: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
"""All processes meet in the same order for each purpose: the number of a meeting tells it from the others."""


def meeting(purpose: str, wait: timedelta) -> PrefixStore:
    """Connect to the store by which the processes found each other; return a part of it that nobody has used.

    Args:
        purpose: What the processes tell each other there; each of them has to ask as often as the others.
        wait: How long the store may take to answer.

    Raises:
        RuntimeError: The store is gone.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A launcher that starts failed processes again keeps its store.
    attempt, number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(_meetings[purpose])
    # A connection of its own: on that of the process group, one call waits for another.
    connection = TCPStore(address, port, is_master=False, timeout=wait)
    return PrefixStore(f"dpo/{purpose}/{attempt}/{number}", connection)


def exchanged(found: str, rank: int, num_ranks: int) -> list[str]:
    """Return what each process has found; all of them wait for each other.

    A device that is not what it should be, such as one that two processes share, ends what goes through devices.

    Args:
        found: What this process has found.
        rank: Which one it is.
        num_ranks: How many there are.

    Raises:
        RuntimeError: The store is gone.
    """
    wait = timedelta(seconds=_LONGEST_SECONDS)
    store = meeting("found", wait)
    store.set(f"of/{rank}", found)
    of_all = [f"of/{other}" for other in range(num_ranks)]
    store.wait(of_all, wait)
    everywhere = [text.decode() for text in store.multi_get(of_all)]
    store.set(f"read/{rank}", "")
    if rank == 0:
        # It may keep the store, and ends first where something is wrong.
        store.wait([f"read/{other}" for other in range(num_ranks)], wait)
    return everywhere
