"""The reference's log-probabilities on disk, keyed by the content of each pair and the reference's identity.

A cache is a folder of Arrow files, each named by the digest of its own bytes: a damaged file is noticed,
left out, and computed again. Files are added, never changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.errors import from_os_error
from dpo_cli.storage import cache_root, file_digest, text_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dpo_cli.data.prepared import PreparedPairs
    from dpo_cli.modeling.batch import PairBatch
    from dpo_cli.preference.reference import ReferenceLogps, ReferenceWork

_VERSION = "1"
"""Raised whenever the same reference would answer with other numbers."""

_BLOCK_PAIRS = 512
"""Pairs that are computed and written together: what an interruption can cost."""

_SCHEMA = pa.schema({"key": pa.binary(16), "chosen": pa.list_(pa.float32()), "rejected": pa.list_(pa.float32())})
_log = logging.getLogger(__name__)

Entry = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Token log-probabilities of a pair's chosen and rejected response."""


def reference_identity(digest: str, accelerator: Accelerator) -> str:
    """Return a digest of everything but the pair that decides a reference log-probability.

    Args:
        digest: What `weights_digest` says of the reference.
        accelerator: Decides device and precision.
    """
    return text_digest(_VERSION, digest, accelerator.mixed_precision, accelerator.device.type)


class ReferenceCache:
    """The log-probabilities that are known of one reference.

    Args:
        identity: What `reference_identity` says of it.
    """

    def __init__(self, identity: str) -> None:
        self.folder = cache_root() / "reference" / identity[:32]
        self._entries: dict[bytes, Entry] = {}
        for path in sorted(self.folder.glob("*.arrow")):
            if file_digest(path) != path.stem:
                _log.warning("%s of the reference cache is damaged; computing its pairs again", path.name)
                path.unlink(missing_ok=True)
                continue
            with pa.memory_map(str(path)) as source:
                self._remember(pa.ipc.open_stream(source).read_all())

    def complete(self, work: ReferenceWork, score: ReferenceLogps) -> None:
        """Compute and write what is missing, block by block.

        What a block's numbers are depends on the block alone, not on where an earlier attempt was
        interrupted or on the number of ranks: a resumed run finds the same bytes.
        """
        keys, indices = work.batches.pairs.keys(), work.needed.tolist()
        if all(keys[i] in self._entries for i in indices):
            return
        for start in range(0, len(indices), _BLOCK_PAIRS):
            block = indices[start : start + _BLOCK_PAIRS]
            missing = list({keys[i]: i for i in block if keys[i] not in self._entries}.values())
            if missing:
                self._compute(missing, keys, work, score)
            work.progress(start + len(block), len(indices))

    def lookup(self, pairs: PreparedPairs, device: torch.device) -> Callable[[PairBatch], Tensor]:
        """Return the function that answers for batches of these pairs."""
        keys = pairs.keys()

        def logps(batch: PairBatch) -> Tensor:
            entries = [self._entries[keys[index]] for index in batch.pairs]
            parts = [chosen for chosen, _ in entries] + [rejected for _, rejected in entries]
            return torch.from_numpy(np.concatenate(parts)).to(device)

        return logps

    def _compute(
        self, missing: Sequence[int], keys: Sequence[bytes], work: ReferenceWork, score: ReferenceLogps
    ) -> None:
        """Score one block, its micro-batches dealt to the ranks, and let the main process write it."""
        accelerator = work.accelerator
        cuts = work.batches.cut(missing)
        mine: list[tuple[bytes, Entry]] = []
        for cut in cuts[accelerator.process_index :: accelerator.num_processes]:
            batch = work.batches(cut)
            tokens = score(batch).cpu().split(list(batch.lengths))
            for place, index in enumerate(cut.pairs):
                entry = tokens[place].numpy().copy(), tokens[len(cut.pairs) + place].numpy().copy()
                mine.append((keys[index], entry))
        found: list[tuple[bytes, Entry]] = gather_object(mine)
        if accelerator.is_main_process:
            self._write(sorted(found, key=lambda item: item[0]))
        self._entries.update(found)

    def _write(self, found: Sequence[tuple[bytes, Entry]]) -> None:
        """Write one file, complete or not at all."""
        columns = [
            pa.array([key for key, _ in found], _SCHEMA.field("key").type),
            pa.array([chosen for _, (chosen, _) in found], _SCHEMA.field("chosen").type),
            pa.array([rejected for _, (_, rejected) in found], _SCHEMA.field("rejected").type),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            writer.write_table(pa.table(columns, schema=_SCHEMA))
        data = sink.getvalue().to_pybytes()
        temporary = self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{hashlib.sha256(data).hexdigest()}.arrow")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise from_os_error(error, "writing the reference cache", str(self.folder)) from error

    def _remember(self, table: pa.Table) -> None:
        for row in range(table.num_rows):
            key, chosen, rejected = (table.column(name)[row] for name in _SCHEMA.names)
            self._entries[key.as_py()] = chosen.values.to_numpy(), rejected.values.to_numpy()
