"""One process at a time: locked files that name their holder.

Such a lock ends with its process, however that ends; a file that a killed process left does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from dpo_cli.system.storage import beat, make_folder, refused

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)


class Locked(Exception):
    """Another process holds a lock. The message names the process."""


def lock_beside(target: Path) -> Path:
    """Return the lock file of a folder that is replaced as a whole, so that the lock cannot lie in it."""
    return target.absolute().with_name(f".{target.absolute().name}.lock")


@contextlib.contextmanager
def locked(path: Path, doing: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes out while the context lasts; on a file system without locks a warning says so.

    Args:
        path: The lock file. It and the folders above it appear, and are gone again if nothing else is in them.
        doing: What the lock is taken for, as an error says it.
        waiting: Called once with the name of the process that holds the lock, which is then waited for; or None,
            not to wait.

    Raises:
        Locked: Another process holds the lock, and `waiting` is None.
        UserError: The disk refuses the lock file.
    """
    path = path.absolute()
    missing = [folder for folder in path.parents if not folder.exists()]
    # A soft lock would outlive a process that is killed.
    lock, taken = FileLock(path, fallback_to_soft=False), None
    try:
        try:
            _acquire(lock, path.parent, waiting)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise refused(error, doing, path.parent) from error
            _log.warning("the file system of %s has no locks: let no other process write there", path.parent)
        # Where the disk is full, the name is missing.
        with contextlib.suppress(OSError):
            taken = path.stat()
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        # A file that cannot be removed does no harm; one that took its place is another's.
        with contextlib.suppress(OSError):
            if taken and os.path.samestat(taken, path.stat()):
                path.unlink()
        lock.release()
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(lock: BaseFileLock, folder: Path, waiting: Callable[[str], None] | None) -> None:
    """Take a lock whose file lies in a folder, which another process may remove meanwhile if it made it."""
    file = Path(lock.lock_file)
    while not lock.is_locked:
        make_folder(folder)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not file.exists():
                # Where no file can be made, filelock waits as if one were locked; this raises the reason.
                _touch(file)
                continue
            holder = _holder(file)
            if waiting is None:
                raise Locked(holder) from None
            waiting(holder)
            waiting = _wait_in_silence
            beat()
            time.sleep(_POLL_SECONDS)


def _touch(file: Path) -> None:
    """Make a file, unless its folder was removed meanwhile."""
    try:
        file.touch()
    except FileNotFoundError:
        if file.parent.exists():
            raise


def _wait_in_silence(holder: str) -> None:
    """Say nothing: it was said."""


def _holder(path: Path) -> str:
    """Return what a lock file says of its holder."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:300] or "another process"
    return "another process"
