"""What the processes of a run tell each other before they compute anything together: through the store alone."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

_LONGEST_SECONDS = 7200.0
"""Who waits for whom, and for how long, is the caller's to say."""
_exchanges = itertools.count()
"""All processes make the same exchanges in the same order: their number tells them apart."""


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
    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=_LONGEST_SECONDS)
    # A launcher that starts failed processes again keeps its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    connection = TCPStore(address, port, is_master=False, timeout=wait)
    store = PrefixStore(f"dpo/found/{attempt}/{next(_exchanges)}", connection)
    store.set(f"of/{rank}", found)
    of_all = [f"of/{other}" for other in range(num_ranks)]
    store.wait(of_all, wait)
    everywhere = [text.decode() for text in store.multi_get(of_all)]
    store.set(f"read/{rank}", "")
    if rank == 0:
        # It may keep the store, and ends first where something is wrong.
        store.wait([f"read/{other}" for other in range(num_ranks)], wait)
    return everywhere
