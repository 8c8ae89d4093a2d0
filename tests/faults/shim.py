"""Something happens at a file operation: what a run is told to do to itself, before its command runs.

Every operation on the files of one folder passes through here: opening for writing, writing, truncating, syncing,
renaming, removing, making folders. A write is what reaches the system, not what waits in a buffer; so a flush is the
write that it causes. What safetensors, tokenizers and Arrow write past Python is seen where Python calls them.

Each public function but `install` is a fault: it is named as `tests.faults.shim:crash_at` and given its arguments.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRASHED = 99
"""The exit status of a run that ended itself here."""

_OPEN = Path("/proc/self/fd")
"""Where Linux has a link for every descriptor, to what it is open on."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Operation:
    """An operation on a file or folder.

    Attributes:
        number: Counted from 1 in each process.
        kind: What is done: `open`, `write`, `truncate`, `fsync`, `rename`, `remove`, `mkdir` or `rmdir`.
        path: What it is done to.
        target: What it is renamed to; else nothing.
        half: Writes the first half of what is to be written; None where nothing is.
    """

    number: int
    kind: str
    path: str
    target: str = ""
    half: Callable[[], object] | None = None


Hook = Callable[[Operation], None]
"""Called with an operation before or after it is done."""


def count(root: str, log: str) -> None:
    """Write a line of JSON about every operation below a folder into a file elsewhere."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(operation: Operation) -> None:
        facts: dict[str, Any] = {"kind": operation.kind, "path": operation.path, "target": operation.target}
        facts["halves"] = operation.half is not None
        os.write(descriptor, json.dumps(facts).encode() + b"\n")

    install(root, before)


def crash_at(root: str, operation: int, half: bool = False) -> None:
    """End the process before an operation, or when half of its bytes are written."""

    def before(found: Operation) -> None:
        if found.number == operation:
            if half and found.half:
                found.half()
            os._exit(CRASHED)

    install(root, before)


def cut_power_at(root: str, aside: str, operation: int, kept: str, seed: int) -> None:
    """End the process before an operation, and take from the disk what was not synced.

    Args:
        root: The folder that stands on the disk.
        aside: A folder elsewhere on it, for what is removed and may come back.
        operation: When the power fails.
        kept: What remains of that which was not synced, a name of `power.KEPT`.
        seed: Decides where that is a matter of chance.
    """
    from tests.faults.power import Disk

    disk = Disk(root, aside)

    def before(found: Operation) -> None:
        if found.number == operation:
            uninstall()
            disk.cut(kept, seed)
            os._exit(CRASHED)
        disk.before(found)

    uninstall = install(root, before, disk.after)


def signal_at(root: str, operation: int, number: int) -> None:
    """Send the process a signal at an operation."""

    def before(found: Operation) -> None:
        if found.number == operation:
            os.kill(os.getpid(), number)

    install(root, before)


HELD = "held at an operation"
"""What a run says that `hold_at` stops."""


def hold_at(root: str, operation: int) -> None:
    """Stand still before an operation, for ever."""

    def before(found: Operation) -> None:
        if found.number == operation:
            print(HELD, file=sys.stderr, flush=True)
            while True:
                time.sleep(1)

    install(root, before)


def install(root: str, before: Hook, after: Hook = lambda operation: None) -> Callable[[], None]:
    """Let every operation below a folder pass through here; return the function that ends it.

    Args:
        root: The folder.
        before: Called before each operation; what it raises comes from the operation.
        after: Called after each that succeeded.
    """
    watch = _Watch(os.path.realpath(root), before, after)
    replacements = [*_of_the_system(watch), *_of_python(watch), *_of_libraries(watch)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, function in replacements:
        setattr(owner, name, function)

    def uninstall() -> None:
        for owner, name, function in originals:
            setattr(owner, name, function)

    return uninstall


_Replacement = tuple[Any, str, Callable[..., Any]]
"""A module or class, the name of its function, and what takes its place."""


class _Watch:
    """Numbers the operations below a folder and tells of them."""

    def __init__(self, root: str, before: Hook, after: Hook) -> None:
        self._root, self._before, self._after = root, before, after
        self._numbers = itertools.count(1)

    def sees(self, path: str) -> bool:
        return path == self._root or path.startswith(f"{self._root}/")

    @contextlib.contextmanager
    def passing(
        self, kind: str, path: str, target: str = "", half: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Do an operation within this."""
        if not self.sees(path):
            yield
            return
        operation = Operation(next(self._numbers), kind, path, target, half)
        self._before(operation)
        yield
        self._after(operation)


def _of_the_system(watch: _Watch) -> Iterator[_Replacement]:
    """Yield what replaces the functions of `os`."""

    def on_name(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, dir_fd: int | None = None) -> Any:
            if _is_vain(kind, _place(path, dir_fd)):
                return real(path, *arguments, dir_fd=dir_fd)
            with watch.passing(kind, _place(path, dir_fd)):
                return real(path, *arguments, dir_fd=dir_fd)

        return call

    def on_descriptor(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: Any, *arguments: Any) -> Any:
            with watch.passing(kind, _place(descriptor)):
                return real(descriptor, *arguments)

        return call

    def renaming(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, target: Any, **folders: int | None) -> Any:
            places = _place(path, folders.get("src_dir_fd")), _place(target, folders.get("dst_dir_fd"))
            with watch.passing("rename", *places):
                return real(path, target, **folders)

        return call

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
            if not flags & _WRITING:
                return real(path, flags, mode, dir_fd=dir_fd)
            with watch.passing("open", _place(path, dir_fd)):
                return real(path, flags, mode, dir_fd=dir_fd)

        return call

    def writing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, data: Any) -> Any:
            with watch.passing("write", _place(descriptor), half=lambda: real(descriptor, _half(data))):
                return real(descriptor, data)

        return call

    for name, kind in (("mkdir", "mkdir"), ("rmdir", "rmdir"), ("unlink", "remove"), ("remove", "remove")):
        yield os, name, on_name(kind, getattr(os, name))
    for name, kind in (("fsync", "fsync"), ("fdatasync", "fsync"), ("truncate", "truncate"), ("ftruncate", "truncate")):
        yield os, name, on_descriptor(kind, getattr(os, name))
    for name in ("rename", "replace"):
        yield os, name, renaming(getattr(os, name))
    yield os, "open", opening(os.open)
    yield os, "write", writing(os.write)


def _of_python(watch: _Watch) -> Iterator[_Replacement]:
    """Yield what replaces `open`: its files are Python's own, above a lowest layer that tells of each write."""
    real = io.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            write = super().write
            with watch.passing("write", _place(self.fileno()), half=lambda: write(_half(data))):
                return write(data)

        def truncate(self, size: int | None = None) -> int:
            with watch.passing("truncate", _place(self.fileno())):
                return super().truncate(size)

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set("wax+") & set(mode) or not watch.sees(_place(file)):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        with contextlib.nullcontext() if isinstance(file, int) else watch.passing("open", _place(file)):
            raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    yield io, "open", opened
    yield builtins, "open", opened


def _of_libraries(watch: _Watch) -> Iterator[_Replacement]:
    """Yield what replaces the functions that write without Python: each call of them is one write."""
    import pyarrow
    import safetensors.torch
    import tokenizers

    def whole(real: Callable[..., Any], place: int) -> Callable[..., Any]:
        truncate = os.truncate

        def call(*arguments: Any, **keywords: Any) -> Any:
            path = _place(arguments[place])

            def half() -> None:
                real(*arguments, **keywords)
                truncate(path, Path(path).stat().st_size // 2)

            with watch.passing("write", path, half=half):
                return real(*arguments, **keywords)

        return call

    arrow_file = pyarrow.OSFile

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        if "w" not in mode:
            return arrow_file(path, mode, *more)
        # By then this is the `open` from above.
        return pyarrow.PythonFile(Path(path).open("wb"), "w")

    yield safetensors.torch, "serialize_file", whole(safetensors.torch.serialize_file, 1)
    yield tokenizers.Tokenizer, "save", whole(tokenizers.Tokenizer.save, 1)
    yield pyarrow, "OSFile", opened


def _place(path: Any, folder: int | None = None) -> str:
    """Return where a name, relative to an open folder maybe, or a descriptor leads."""
    if isinstance(path, int):
        return str(_OPEN.joinpath(str(path)).readlink())
    base = Path.cwd() if folder is None else Path(_place(folder))
    return os.path.normpath(base / os.fsdecode(path))


def _is_vain(kind: str, path: str) -> bool:
    """Tell whether an operation fails and changes nothing: folders are asked for more often than they are made."""
    exists = os.path.lexists(path)
    return exists or not Path(path).parent.is_dir() if kind == "mkdir" else not exists


def _half(data: Any) -> memoryview:
    whole = memoryview(data).cast("B")
    return whole[: len(whole) // 2]
