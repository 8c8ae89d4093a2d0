"""One process at a time: locks of the operating system on small files that name their holder.

Such a lock ends with its process, however that ends; a file that a killed process left does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_cli.system.storage import make_folder, refused

_POLL_SECONDS = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
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
    descriptor = None
    try:
        try:
            descriptor = _take(path, waiting)
        except OSError as error:
            raise refused(error, doing, path.parent) from error
        yield
    finally:
        if descriptor is not None:
            # A file that cannot be removed does no harm.
            with contextlib.suppress(OSError):
                if is_open_at(descriptor, path):
                    path.unlink()
            os.close(descriptor)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(path: Path, waiting: Callable[[str], None] | None) -> int:
    """Open and lock a file that is still at its path then; return its descriptor."""
    while True:
        make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if path.parent.exists():
                raise
            # Whoever made the folder with us has just removed it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_open_at(descriptor, path):
                _sign(descriptor)
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace") or "another process"
            os.close(descriptor)
            if waiting is None:
                raise Locked(holder) from None
            waiting(holder)
            waiting = _wait_in_silence
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            _log.warning("the file system of %s has no locks: let no other process write there", path.parent)
            return descriptor


def _wait_in_silence(holder: str) -> None:
    """Say nothing: it was said."""


def _sign(descriptor: int) -> None:
    """Write into a lock file who holds it; where the disk is full, nobody is told."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def is_open_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is the one that stands at a path, not one that was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False
