"""Which digest the weights in some files have, without reading them: kept beside the files' stamps.

A stamp has size, number and times of each file. An edit that keeps all of them is not noticed: it takes a clock that
was set back, or a disk that was written to past the file system. Whoever can write to the cache is trusted, as with the
log-probabilities that it keeps.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli import __version__
from dpo_cli.modeling.digests import SCHEME
from dpo_cli.system.storage import cache_root, make_folder, remove_strays_of, text_digest, write_text

if TYPE_CHECKING:
    from dpo_cli.modeling.folders.model_files import Trust
    from dpo_cli.modeling.held import Held

Stamp = dict[str, list[int]]
"""By the path of a file: its size, when its content and when anything of it was changed, in ns, and its number."""

_SPLIT = "split"
_SETTLED_SECONDS = 2.0
"""How old a file has to be: two changes that are closer than a clock's tick have one time."""


def identity_of(digests: Iterable[str], held: Held) -> str:
    """Return the identity of what answers, by the digests of its parts and how its weights are held."""
    model, *others = digests
    # Of the same weights in float32 the digest is the same, and the answers are not.
    others += [_SPLIT] if held.type == _SPLIT else []
    return text_digest(model, *others) if others else model


def same_weights(identity: str, other: str) -> bool:
    """Tell whether two models have the same weights by their identities, though one may hold them split."""
    return identity == other or other == text_digest(identity, _SPLIT) or identity == text_digest(other, _SPLIT)


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file, or of the files in a model folder; empty where they cannot be looked at."""
    stamp: Stamp = {}
    with contextlib.suppress(OSError):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                found = file.stat()
                stamp[str(file.resolve())] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return stamp


def remember_identity(path: Path, stamp: Stamp, held: Held, trust: Trust, identity: str) -> None:
    """Keep the identity of the model in a folder or file.

    Args:
        path: Where its weights were read.
        stamp: The files' stamp before that; where they have changed since or just before, nothing is kept.
        held: How its weights are held.
        trust: What it was trusted with.
        identity: Its identity.
    """
    old = (time.time() - _SETTLED_SECONDS) * 1e9
    if not stamp or stamp != stamp_of(path) or any(changed > old for _, _, changed, _ in stamp.values()):
        return
    with contextlib.suppress(OSError):
        record = _record(path, held, trust)
        make_folder(record.parent)
        # Whoever else may be writing it now writes the same, and can do without.
        remove_strays_of(record)
        write_text(record, json.dumps({"files": stamp, "identity": identity}, indent=1) + "\n")


def known_identity(path: Path, held: Held, trust: Trust) -> str | None:
    """Return what `remember_identity` kept of a model whose files are as they were then; None: nothing."""
    try:
        found = json.loads(_record(path, held, trust).read_text(encoding="utf-8"))
        identity, stamp = found["identity"], found["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return identity if isinstance(identity, str) and stamp and stamp == stamp_of(path) else None


def _record(path: Path, held: Held, trust: Trust) -> Path:
    """Return the file that the identity of a model is kept in: another for all that an identity depends on."""
    versions = (__version__, SCHEME, importlib.metadata.version("transformers"))
    key = text_digest(*versions, str(path.resolve()), repr(held), repr(trust))
    return cache_root() / "identities" / f"{key[:32]}.json"
