"""Whether two machines have the same model, by a sample of its bytes: the whole of it would take minutes to read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder, holds_adapter
from dpo_cli.modeling.folders.model_files import CONFIG, weights_files
from dpo_cli.modeling.folders.model_names import is_gguf
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.folders.resolving import load_named

if TYPE_CHECKING:
    from dpo_cli.modeling.folders.model_files import Trust

_NUM_BLOCKS, _BLOCK_BYTES = 64, 4096
"""Evenly spread over a file; trained weights differ from others almost everywhere."""
_HEAD_BYTES = 1 << 20
"""From the beginning, where a file says what it has."""


def sampled_digest(name: str, trust: Trust) -> str:
    """Return a digest of a model's settings and of a sample of its weights; of an adapter, with those of its base.

    Raises:
        UserError: It cannot be read.
    """
    digest = hashlib.sha256()

    def sample(folder: str) -> None:
        files = [Path(name)] if is_gguf(name) else [Path(folder) / CONFIG, *weights_files(Path(folder))]
        for file in [*files, *(_adapter(name) if holds_adapter(name) else [])]:
            digest.update(_sample(file))

    load_named(name, "model", sample, trust)
    return digest.hexdigest()


def sampled_adapter_digest(name: str) -> str:
    """Return a digest of an adapter's settings and of a sample of its weights, without those of the base it names.

    Raises:
        UserError: It cannot be read.
    """
    digest = hashlib.sha256()
    with explained(name, "adapter"):
        for file in _adapter(name):
            digest.update(_sample(file))
    return digest.hexdigest()


def _adapter(name: str) -> list[Path]:
    """Return an adapter's files that are on this disk."""
    folder = adapter_folder(name)
    return [folder / file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (folder / file).is_file()]


def _sample(path: Path) -> bytes:
    """Return the size, the beginning, some blocks and the end of a file, digested."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
        digest.update(file.read(_HEAD_BYTES))
        for block in range(1, _NUM_BLOCKS + 1):
            file.seek(max(0, size * block // _NUM_BLOCKS - _BLOCK_BYTES))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.digest()
