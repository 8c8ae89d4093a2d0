"""Errors of a process that no other knows of yet: it found them before the processes of the run found each other.

Most such errors are those of all processes, and the main one has shown them. One that is its own, such as a file that
is missing on its machine, it shows itself.
"""

from __future__ import annotations

import os
import socket
import sys
import time

from dpo_cli.errors import UserError
from dpo_cli.system.launchers import is_main_process, num_ranks, numbering_errors

_GRACE_SECONDS = 5.0
"""How long a launcher may take to end the others where the main process has failed."""
_PATIENCE_SECONDS = 30.0
"""How long the main process may take to where others find it."""
_POLL_SECONDS = 0.5


def speaks_for_itself() -> bool:
    """Tell whether this process, not the main one, has to show its own errors; wait until that is known."""
    # One that is wrongly numbered shows its errors anyway.
    if is_main_process() or any(numbering_errors()) or num_ranks() == 1 or _have_met():
        return False
    time.sleep(_GRACE_SECONDS)
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        # The main process waits there for the others: what is wrong here is not wrong there.
        if _is_open():
            return True
        time.sleep(_POLL_SECONDS)
    # It has failed, most likely for the same reason; of each other machine, one says so.
    return os.environ.get("LOCAL_RANK") == "0"


def of_this_rank(error: UserError) -> UserError:
    """Return an error that names this process."""
    named = f"rank {os.environ['RANK']} (on {socket.gethostname()}): {error.what}"
    return UserError(named, error.where, error.hint, status=error.status)


def _have_met() -> bool:
    """Tell whether the processes have found each other."""
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def _is_open() -> bool:
    """Tell whether the processes could find each other now."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection(address, timeout=_POLL_SECONDS):
            return True
    except OSError:
        return False
