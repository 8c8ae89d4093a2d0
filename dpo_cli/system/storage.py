"""Folders that are either whole or absent.

Everything the program keeps (prepared data, converted models, reference log-probabilities, checkpoints,
the final model) is written into a temporary folder, sealed with a manifest of sizes and digests, flushed
to disk and renamed. A reader checks the seal before it uses a byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dpo_cli.errors import UserError, from_os_error

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_DAY_SECONDS = 24 * 60 * 60
_FLUSHED_BYTES = 2**30
"""The most that is written to a file before it is flushed: a disk takes seconds for it, not minutes."""
_T = TypeVar("_T")
_filling: set[Path] = set()
_num_heartbeats = 0


class DamagedFolder(Exception):
    """A sealed folder whose content is not what its manifest says. The message names the file."""


def cache_root() -> Path:
    """Return the folder for what can be computed again: `$DPO_CACHE_DIR`, else the user's cache folder.

    Raises:
        UserError: The user has no home, and no other folder is named.
    """
    if chosen := os.environ.get("DPO_CACHE_DIR"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-cli"
    except RuntimeError:
        hint = "set the environment variable DPO_CACHE_DIR to a folder"
        raise UserError("the cache has no folder, since the user has no home folder", None, hint) from None


def why_no_folder(path: Path) -> str | None:
    """Say what is in the way of making a folder, at its path or above: a file, or a link to nothing; or None.

    Raises:
        OSError: The system does not let us look.
    """
    for place in (path, *path.absolute().parents):
        # One look each, since another process may make or remove the folder meanwhile.
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            if place.is_symlink():
                return f"`{place}` is a link to `{place.readlink()}`, which does not exist"
        else:
            return None if is_folder else f"`{place}` is a file"
    return None


def refused(error: OSError, doing: str, path: Path) -> UserError:
    """Turn a refusal to write below a folder into a `UserError`; in the cache, its hint names the way to another."""
    found = from_os_error(error, doing, str(path))
    with contextlib.suppress(UserError):
        if path.absolute().is_relative_to(cache_root().absolute()):
            found.hint = f"{found.hint}; the environment variable DPO_CACHE_DIR names the folder of the cache"
    return found


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flushed_digest(path: Path) -> str:
    """Make sure that a file is on the disk, and its name; return the SHA-256 of its bytes, in hex."""
    _flush(path)
    # Another machine that flushes the folder may not know of a name that this one has given.
    _flush(path.parent)
    return file_digest(path)


def text_digest(*parts: str) -> str:
    """Return the SHA-256 of several texts, in hex; where one ends and the next begins matters."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new, never a part of it."""
    write_bytes(path, text.encode("utf-8"))


def temporary_for(path: Path) -> Path:
    """Return a new name beside a path, for a file that is there for a moment; one that is left is a stray."""
    return path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old bytes or the new, never a part of them."""
    with rewritten(path) as file:
        file.write(data)


@contextlib.contextmanager
def rewritten(path: Path) -> Iterator[BinaryIO]:
    """Write a file part by part; a reader finds the old bytes until the context ends, and all of the new ones then."""
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_flushing(file: BinaryIO, parts: Iterable[memoryview]) -> None:
    """Write bytes one part after the other and flush again and again, so that no single flush takes long.

    Other processes see that this one gets on; the last bytes are left for whoever flushes the whole.

    Args:
        file: Open for writing.
        parts: The bytes.
    """
    room = _FLUSHED_BYTES
    for part in parts:
        rest = part
        while rest:
            file.write(rest[:room])
            room, rest = room - len(rest[:room]), rest[room:]
            if not room:
                file.flush()
                os.fsync(file.fileno())
                beat()
                room = _FLUSHED_BYTES


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, so that they outlive a power cut."""
    while not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
            _flush(folder.parent)
        except FileNotFoundError:
            # Another process may have removed the one above, which it had made for a lock; else nothing can be made.
            if folder.parent.is_dir():
                raise
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def is_open_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is the one at a path, not one that was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def sealed_folder(
    target: Path, details: dict[str, Any], *, waits: bool = False, replaces: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder to fill; on leaving it is sealed, flushed and renamed to `target`.

    Where anything fails, the temporary folder is removed and `target` stays as it was.

    Args:
        target: The folder to appear. Its parents are created.
        details: What the manifest says beside sizes and digests; it may be filled until the folder is left.
        waits: Whether filling it waits for other processes, so that it counts as being filled only at the end.
        replaces: Whether an older `target` is replaced.

    Raises:
        OSError: The disk refuses; or there is a `target`, which must not be replaced.
    """
    temporary = started_folder(target)
    with _filled(temporary):
        if waits:
            _filling.discard(temporary)
        yield temporary
        _filling.add(temporary)
        _seal(temporary, details, {})
        _rename(temporary, target, replaces=replaces)


def started_folder(target: Path) -> Path:
    """Make a temporary folder beside the one that is to appear, which `finish_folder` seals, and return it."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary


def finish_folder(temporary: Path, target: Path, known: Mapping[str, tuple[int, str]]) -> None:
    """Seal, flush and rename a folder that several processes have filled.

    Args:
        temporary: What `started_folder` returned; it is removed where this fails.
        target: The folder to appear.
        known: Size and digest of files that others have flushed, by name.
    """
    with _filled(temporary):
        _seal(temporary, {}, known)
        _rename(temporary, target)


@contextlib.contextmanager
def _filled(temporary: Path) -> Iterator[None]:
    """Let others know that a folder is being filled, and remove it where that fails."""
    _filling.add(temporary)
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _filling.discard(temporary)


def _rename(temporary: Path, target: Path, *, replaces: bool = True) -> None:
    """Let a sealed folder appear, in place of an older one if there is one and it may be replaced."""
    if not replaces and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not replaces or not target.exists():
        # Where another process makes one at this moment, the system refuses, unless it is an empty folder.
        temporary.rename(target)
        _flush(target.parent)
        return
    replaced = target.with_name(f".{target.name}{_TEMPORARY}replaced-{secrets.token_hex(4)}")
    target.rename(replaced)
    try:
        temporary.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    # The new one's name is certain before the old one is gone.
    _flush(target.parent)
    remove(replaced)


def is_filling() -> bool:
    """Tell whether any thread of this process is filling a folder that is going to be sealed."""
    return bool(_filling)


def beat() -> None:
    """Note that this process gets on although it computes nothing: it has flushed a file, or waits for a lock."""
    global _num_heartbeats
    _num_heartbeats += 1


def heartbeats() -> int:
    """Return how often this process has noted that it gets on."""
    return _num_heartbeats


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a sealed folder's manifest without checking the files.

    Raises:
        DamagedFolder: There is no manifest, or it is not one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFolder(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise DamagedFolder(f"{MANIFEST} cannot be read") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedFolder(f"{MANIFEST} is not a manifest")
    return manifest


def verify(folder: Path, edited: Collection[str] = ()) -> dict[str, Any]:
    """Check every file of a sealed folder against its manifest and return the manifest.

    Args:
        folder: The folder.
        edited: Names of files that may have other bytes.

    Raises:
        DamagedFolder: A file is missing, too short, too long, or has other bytes.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedFolder(f"{MANIFEST} names a file outside the folder: {name}")
        try:
            size = path.stat().st_size
            if name in edited and path.is_file():
                continue
            if not path.is_file() or size != expected["bytes"]:
                raise DamagedFolder(f"{name} has {size} bytes instead of {expected['bytes']}")
            if file_digest(path) != expected["sha256"]:
                raise DamagedFolder(f"{name} does not have the bytes it was saved with")
        except FileNotFoundError:
            raise DamagedFolder(f"{name} is missing") from None
        except OSError as error:
            raise DamagedFolder(f"{name} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            # No file can have such a name, or nothing is said of it.
            raise DamagedFolder(f"{MANIFEST} is not a manifest") from None
    return manifest


def strays(parent: Path) -> set[Path]:
    """Return what interrupted writers left in a folder."""
    return set(parent.glob(f".*{_TEMPORARY}*"))


def remove_strays(parent: Path) -> None:
    """Remove for good what interrupted writers left in a folder that only this process writes to."""
    if found := strays(parent):
        _remove(found)
        _flush(parent)


def remove_strays_of(target: Path) -> None:
    """Remove what interrupted writers left of a file or folder that only this process writes."""
    _remove(stray for stray in strays(target.parent) if stray.name.startswith(f".{target.name}{_TEMPORARY}"))


def remove_old_strays(parent: Path) -> None:
    """Remove what was left in a folder to which others may be writing: what nobody has touched for a day."""
    old = time.time() - _DAY_SECONDS
    _remove(stray for stray in strays(parent) if _untouched_since(old, stray))


def _untouched_since(moment: float, stray: Path) -> bool:
    try:
        return all(path.stat().st_mtime < moment for path in (stray, *stray.rglob("*")))
    except FileNotFoundError:
        # Another process is at work on it.
        return False


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder for good; wherever this is interrupted, it is whole or what is left of it counts as a stray."""
    stray = folder.with_name(f".{folder.name}{_TEMPORARY}removed-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        folder.rename(stray)
        # After a power cut the old name could otherwise belong to a part of the files.
        _flush(folder.parent)
        remove(stray)
        _flush(folder.parent)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        remove(path)


def _seal(folder: Path, details: dict[str, Any], known: Mapping[str, tuple[int, str]]) -> None:
    """Write the manifest over all files of a folder and flush everything to disk, but what is known already."""
    for name in known:
        # A disk that is not the others' lacks it.
        (folder / name).stat()
    paths = sorted(path for path in folder.rglob("*") if path.relative_to(folder).as_posix() not in known)
    files = [path for path in paths if path.is_file()]
    # Some libraries write files that nobody else may read, whatever the user's umask says.
    mode = folder.stat().st_mode & 0o666
    for path in files:
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
    # The processor takes them while the disk is at work.
    digests = _started(lambda: [file_digest(path) for path in files])
    for path in paths:
        _flush(path)
    sealed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests.result(), strict=True)
    } | {name: {"bytes": size, "sha256": digest} for name, (size, digest) in known.items()}
    write_bytes(folder / MANIFEST, manifest_bytes({**details, "files": sealed}))


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest as it is written."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _started(work: Callable[[], _T]) -> Future[_T]:
    """Let a thread do some work, for which a program that is stopped does not wait."""
    future: Future[_T] = Future()

    def finish() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=finish, daemon=True).start()
    return future


def _flush(path: Path) -> None:
    """Ask the disk to keep a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        beat()
    finally:
        os.close(descriptor)
