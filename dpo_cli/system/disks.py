"""Which processes of a run share a disk: found out by a file that each of them writes and the others look for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.system.storage import make_folder, temporary_for

Gather = Callable[[list[Any]], list[Any]]
"""Returns the items of all processes, in the order of their ranks; all of them have to call it."""


def first_of_each_disk(folder: Path, gather: Gather) -> list[int | None]:
    """Return for each process the first one that sees the same files in a folder; all of them have to ask.

    Args:
        folder: The folder, which has the same name in all processes and is made where it is missing.
        gather: Exchanges what they find.

    Returns:
        A rank for each rank: its own where no earlier one shares the disk; None where the disk takes no file.
    """
    # A network file system may answer from memory of a name that was asked for before: of a new one it cannot.
    mark = temporary_for(folder / "seen")
    written = ""
    with contextlib.suppress(OSError):
        make_folder(folder)
        mark.touch()
        written = mark.name
    try:
        marks = gather([written])
        return gather([next((rank for rank, name in enumerate(marks) if name and _is_there(folder / name)), None)])
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
