"""What a disk holds after a power cut.

The rules are those that POSIX gives, and no more: the bytes of a file are kept once it was synced; what was made,
renamed or removed in a folder is kept once the folder was. Everything else may be there or not. Kernels keep more
than that; which of it differs from one file system to the next.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.shim import Operation

KEPT = {
    "nothing": "no byte and no name that was not synced",
    "names": "all names; of the bytes only those that were synced",
    "zeros": "all names and sizes; zeros stand in the place of bytes that were not synced",
    "some": "by chance: what was done in each folder up to some moment, and a part of the bytes of each file",
}
"""What may remain of that which was not synced."""

_Identity = tuple[int, int]
"""Device and number of a file or folder, whatever its name."""


@dataclass(frozen=True)
class _Change:
    """A change of a folder that is not certain yet.

    Attributes:
        folder: The folder.
        undo: Takes it back; called with the folder's path.
    """

    folder: _Identity
    undo: Callable[[Path], None]


@dataclass(frozen=True)
class _Found:
    """What stood where an operation was about to be done.

    Attributes:
        nothing: Whether nothing did.
        folder: The folder that it removes.
        kept: A second name of the file that it removes or replaces.
    """

    nothing: bool = False
    folder: _Identity | None = None
    kept: Path | None = None


class Disk:
    """Keeps account of what is certain of a folder while a run changes it.

    What stands there in the beginning is.

    Args:
        root: The folder.
        aside: A folder elsewhere on the same disk, for what is removed and may come back.
    """

    def __init__(self, root: str, aside: str) -> None:
        self._root, self._aside = Path(root), Path(aside)
        self._aside.mkdir(parents=True)
        self._num_kept = 0
        self._found = _Found()
        self._certain_bytes: dict[_Identity, int] = {}
        self._changes: list[_Change] = []
        # A number stays a folder's own as long as the folder is open.
        self._open: dict[_Identity, int] = {}
        self._made_again: dict[_Identity, Path] = {}

    def before(self, operation: Operation) -> None:
        """Keep what an operation may destroy; it may still fail."""
        path, target = Path(operation.path), Path(operation.target)
        if operation.kind == "remove":
            self._found = _Found(kept=self._keep(path))
        elif operation.kind == "rename":
            assert path.parent == target.parent, "a rename from one folder into another would be two changes"
            self._found = _Found(kept=self._keep(target))
        elif operation.kind == "rmdir":
            self._found = _Found(folder=self._identify(path))
        else:
            self._found = _Found(nothing=not path.exists())
            if path.is_file():
                self._certain_bytes.setdefault(_identity(path), path.stat().st_size)

    def after(self, operation: Operation) -> None:
        """Take an operation down that succeeded."""
        path, target, found = Path(operation.path), Path(operation.target), self._found
        if operation.kind == "fsync":
            self._sync(path)
        elif operation.kind == "mkdir":
            self._note(path, shutil.rmtree)
        elif operation.kind == "rmdir":
            self._note(path, lambda path: self._make_again(path, found.folder))
        elif operation.kind == "remove":
            self._note(path, lambda path: _put_back(found.kept, path))
        elif operation.kind == "rename":
            self._note(path, lambda path: _rename_back(path, path.with_name(target.name), found.kept))
        elif found.nothing:
            self._certain_bytes[_identity(path)] = 0
            self._note(path, Path.unlink)
        else:
            # What was cut off is gone for certain: that is the worse of both.
            identity, size = _identity(path), path.stat().st_size
            self._certain_bytes[identity] = min(size, self._certain_bytes[identity])

    def cut(self, kept: str, seed: int) -> None:
        """Leave of the folder what the disk holds when the power fails.

        Args:
            kept: A name of `KEPT`.
            seed: Decides what is a matter of chance.
        """
        chance = random.Random(seed)
        for change in reversed(self._lost(kept, chance)):
            if folder := self._find(change.folder):
                change.undo(folder)
        for path in sorted(self._root.rglob("*")):
            # A folder may have the number of a file that is gone; it has no bytes to lose.
            certain = None if path.is_dir() else self._certain_bytes.get(_identity(path))
            if certain is not None:
                _lose_bytes(path, certain, kept, chance)

    def _lost(self, kept: str, chance: random.Random) -> list[_Change]:
        """Return the changes of folders that did not reach the disk, the oldest first."""
        if kept != "some":
            return self._changes if kept == "nothing" else []
        lost: list[_Change] = []
        for folder in dict.fromkeys(change.folder for change in self._changes):
            changes = [change for change in self._changes if change.folder == folder]
            lost += changes[chance.randint(0, len(changes)) :]
        return [change for change in self._changes if change in lost]

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            folder = _identity(path)
            self._changes = [change for change in self._changes if change.folder != folder]
        else:
            self._certain_bytes[_identity(path)] = path.stat().st_size

    def _note(self, path: Path, undo: Callable[[Path], None]) -> None:
        """Take a change of a folder down; `undo` is called with the path that was changed."""
        self._changes.append(_Change(self._identify(path.parent), lambda folder: undo(folder / path.name)))

    def _keep(self, path: Path) -> Path | None:
        """Give a file a second name, so that it outlives its first; return that name."""
        if not path.is_file():
            return None
        self._num_kept += 1
        kept = self._aside / str(self._num_kept)
        os.link(path, kept)
        return kept

    def _identify(self, folder: Path) -> _Identity:
        identity = _identity(folder)
        if identity not in self._open:
            self._open[identity] = os.open(folder, os.O_RDONLY)
        return identity

    def _find(self, folder: _Identity) -> Path | None:
        """Return where a folder stands now, if it still does."""
        path = self._made_again.get(folder) or Path(f"/proc/self/fd/{self._open[folder]}").readlink()
        return path if path.is_dir() else None

    def _make_again(self, path: Path, folder: _Identity | None) -> None:
        assert folder is not None
        path.mkdir()
        self._made_again[folder] = path


def _identity(path: Path) -> _Identity:
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _lose_bytes(path: Path, certain: int, kept: str, chance: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, chance.randint(certain, size) if kept == "some" else certain)
    if kept == "zeros" or (kept == "some" and chance.random() < 0.5):
        os.truncate(path, size)


def _put_back(kept: Path | None, path: Path) -> None:
    if kept:
        kept.rename(path)


def _rename_back(path: Path, target: Path, kept: Path | None) -> None:
    target.rename(path)
    _put_back(kept, target)
