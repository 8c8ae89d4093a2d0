"""The reference's log-probabilities on disk, keyed by the content of each pair and the reference's identity.

A cache is a folder of Arrow files, each named by the digest of its own bytes: a damaged file is noticed,
left out, and computed again. Files are added, never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.system.locks import locked
from dpo_cli.system.storage import cache_root, file_digest, refused, remove, remove_strays, text_digest, write_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dpo_cli.data.prepared.folder import PreparedPairs
    from dpo_cli.modeling.batch import PairBatch
    from dpo_cli.preference.reference import ReferenceLogps, ReferenceWork

_VERSION = "2"
"""Raised whenever the same reference would answer with other numbers."""

_BLOCK_PAIRS = 512
"""Pairs that are computed and written together: what an interruption can cost."""

_COLUMNS = pa.schema({"key": pa.binary(16), "chosen": pa.list_(pa.float32()), "rejected": pa.list_(pa.float32())})
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
        self._schema = _COLUMNS.with_metadata({"reference": identity})
        self._entries: dict[bytes, Entry] = {}
        self._read()

    def complete(self, work: ReferenceWork, score: ReferenceLogps) -> None:
        """Compute and write what is missing, block by block, while no other process does.

        What a block's numbers are depends on the block alone, not on where an earlier attempt was
        interrupted or on the number of ranks: a resumed run finds the same bytes.
        """
        keys, indices, main = work.batches.pairs.keys(), work.needed.tolist(), work.accelerator.is_main_process
        wanted = {keys[index] for index in indices}
        # Ranks may have caches of their own, or look at one at different moments.
        if not any(gather_object([not wanted <= self._entries.keys()])):
            return
        with self._alone(work.accelerator):
            if main:
                self._read()
            lacking = set().union(*gather_object([wanted - self._entries.keys()]))
            known = [{key: self._entries[key] for key in lacking & self._entries.keys()} if main else {}]
            self._entries.update(broadcast_object_list(known)[0])
            lacking -= known[0].keys()
            for start in range(0, len(indices), _BLOCK_PAIRS):
                stop = min(start + _BLOCK_PAIRS, len(indices))
                block = indices[start:stop]
                missing = list({keys[i]: i for i in block if keys[i] in lacking}.values())
                if missing:
                    self._compute(missing, keys, work, score, stop - len(missing))
                work.progress(stop, len(indices))

    def lookup(self, pairs: PreparedPairs, device: torch.device) -> Callable[[PairBatch], Tensor]:
        """Return the function that answers for batches of these pairs."""
        keys = pairs.keys()

        def logps(batch: PairBatch) -> Tensor:
            entries = [self._entries[keys[index]] for index in batch.pairs]
            parts = [chosen for chosen, _ in entries] + [rejected for _, rejected in entries]
            return torch.from_numpy(np.concatenate(parts)).to(device)

        return logps

    def _compute(
        self, missing: Sequence[int], keys: Sequence[bytes], work: ReferenceWork, score: ReferenceLogps, done: int
    ) -> None:
        """Score one block, its micro-batches dealt to the ranks, and let the main process write it.

        Args:
            missing: The pairs of the block that are not known.
            keys: The keys of all pairs.
            work: What the reference has to answer for.
            score: Answers.
            done: How many pairs need no more work.
        """
        accelerator = work.accelerator
        cuts, num_ranks = work.batches.cut(missing), accelerator.num_processes
        mine: list[tuple[bytes, Entry]] = []
        for place, cut in enumerate(cuts[accelerator.process_index :: num_ranks], 1):
            batch = work.batches(cut)
            tokens = score(batch).cpu().split(list(batch.lengths))
            for place, index in enumerate(cut.pairs):
                entry = tokens[place].numpy().copy(), tokens[len(cut.pairs) + place].numpy().copy()
                mine.append((keys[index], entry))
            # The ranks go through as many micro-batches in about the same time; the last are waited for below.
            if place * num_ranks < len(cuts):
                dealt = cuts[: place * num_ranks]
                work.progress(done + sum(len(one.pairs) for one in dealt), len(work.needed))
        found: list[tuple[bytes, Entry]] = gather_object(mine)
        if accelerator.is_main_process:
            self._write(sorted(found, key=lambda item: item[0]))
        self._entries.update(found)

    def _write(self, found: Sequence[tuple[bytes, Entry]]) -> None:
        """Write one file, complete or not at all."""
        columns = [
            pa.array([key for key, _ in found], self._schema.field("key").type),
            pa.array([chosen for _, (chosen, _) in found], self._schema.field("chosen").type),
            pa.array([rejected for _, (_, rejected) in found], self._schema.field("rejected").type),
        ]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as writer:
            writer.write_table(pa.table(columns, schema=self._schema))
        data = sink.getvalue().to_pybytes()
        try:
            remove_strays(self.folder)
            write_bytes(self.folder / f"{hashlib.sha256(data).hexdigest()}.arrow", data)
        except OSError as error:
            raise refused(error, "writing the reference cache", self.folder) from error

    @contextlib.contextmanager
    def _alone(self, accelerator: Accelerator) -> Iterator[None]:
        """Let the main process keep other runs out, so that two do not compute the same."""
        lock = locked(self.folder / ".lock", "locking the reference cache", _tell)
        with lock if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            yield

    def _read(self) -> None:
        """Take in what the folder has, but for what is damaged or was computed by another reference."""
        for path in sorted(self.folder.glob("*.arrow")):
            if reason := self._refusal(path):
                _log.warning("%s of the reference cache %s; computing its pairs again", path.name, reason)
            else:
                with pa.memory_map(str(path)) as source:
                    self._remember(pa.ipc.open_stream(source).read_all())

    def _refusal(self, path: Path) -> str:
        """Say why a file is not to be believed, or nothing; one that will never be is removed."""
        reason = "is another reference's"
        try:
            if file_digest(path) != path.stem:
                reason = "is damaged"
            else:
                with pa.memory_map(str(path)) as source:
                    if pa.ipc.open_stream(source).schema.equals(self._schema, check_metadata=True):
                        return ""
        except (IsADirectoryError, pa.ArrowInvalid):
            reason = "is no such file"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        with contextlib.suppress(OSError):
            remove(path)
        return reason

    def _remember(self, table: pa.Table) -> None:
        for row in range(table.num_rows):
            key, chosen, rejected = (table.column(name)[row] for name in self._schema.names)
            self._entries[key.as_py()] = chosen.values.to_numpy(), rejected.values.to_numpy()


def _tell(holder: str) -> None:
    """Say for whom this process waits."""
    _log.warning("waiting for %s, which computes the same reference log-probabilities", holder)
