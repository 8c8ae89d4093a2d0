"""What no input may bring the program to: files elsewhere, other processes, the network, unpickling, or no end."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.waiting import PATIENCE


class Forbidden(BaseException):
    """Something that no input may bring about. No handler of an `Exception` can swallow it."""


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_CHANGED = {
    "os.chmod": (0,),
    "os.link": (1,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "shutil.rmtree": (0,),
}
"""Events of Python's audit that change the disk, and which of their arguments name what is changed."""

_REFUSED = frozenset(
    ("os.exec", "os.posix_spawn", "os.system", "pickle.find_class", "socket.connect", "subprocess.Popen")
)
"""Events that no file may cause, whatever is in it."""

_ASKED_OF_GIT = ["git", "rev-parse", "HEAD"]
"""What a run notes of the folder that it was started in."""

_INSTALLATION = tuple(str(Path(name).resolve()) for name in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
"""Where what is imported is read from, and what every file may be read from in passing."""


@dataclass
class _Watch:
    """What is allowed at the moment."""

    folder: str
    reads_elsewhere: bool

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise if an event of Python's audit is not allowed."""
        if event in _REFUSED and _ASKED_OF_GIT not in arguments:
            raise Forbidden(f"{event} {arguments!r:.200}")
        if event == "open":
            name, _, flags = arguments
            if (flags or 0) & _WRITES:
                self._check(event, name)
            elif not self.reads_elsewhere:
                self._check(event, name, *_INSTALLATION, "/proc/", "/sys/")
        for place in _CHANGED.get(event, ()):
            self._check(event, arguments[place])

    def _check(self, event: str, name: Any, *more: str) -> None:
        """Raise if a name leads out of the folder; what is named relative to another open folder is its opener's."""
        if isinstance(name, int):
            return
        try:
            path = os.path.realpath(os.fsdecode(name))
        except ValueError:  # No file has such a name.
            return
        if path != os.devnull and not path.startswith((self.folder, *more)):
            raise Forbidden(f"{event} of {path}")


_watches: list[_Watch] = []


@functools.cache
def _install() -> None:
    """Listen to Python's audit, which cannot be undone."""
    sys.addaudithook(lambda event, arguments: _watches[-1].see(event, arguments) if _watches else None)


@contextlib.contextmanager
def confined(folder: Path, *, reads_elsewhere: bool = True) -> Iterator[None]:
    """Let Python write in a folder alone, and start and connect to nothing.

    Args:
        folder: Where files may be written; it becomes the working folder.
        reads_elsewhere: Whether files elsewhere may be read.

    Raises:
        Forbidden: Something else was tried.
    """
    _install()
    with contextlib.chdir(folder), _temporary_folders_in(folder):
        _watches.append(_Watch(str(folder.resolve()), reads_elsewhere))
        try:
            yield
        finally:
            _watches.pop()


@contextlib.contextmanager
def _temporary_folders_in(folder: Path) -> Iterator[None]:
    """Make temporary folders in a folder: where the system has them, no input decides."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Allow something so much of the processor's time, and so long that even a busy machine has given it that.

    Raises:
        Forbidden: It took longer.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Forbidden(f"no end after {seconds:g} s")

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def sparing(num_bytes: int) -> Iterator[None]:
    """Let this process take so much more memory; what asks for more gets a `MemoryError`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
