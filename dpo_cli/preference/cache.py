"""The reference's log-probabilities on disk, keyed by the content of each pair and the reference's identity.

A cache is a folder of Arrow files, each named by the digest of its own bytes: a damaged file is noticed,
left out, and computed again. Files are added, never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.preference.dealing import dealt
from dpo_cli.system.disks import first_of_each_disk
from dpo_cli.system.locks import locked
from dpo_cli.system.storage import (
    cache_root,
    file_digest,
    refused,
    remove,
    remove_old_strays,
    remove_strays,
    text_digest,
    write_bytes,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dpo_cli.modeling.batch import Batches, PairBatch
    from dpo_cli.modeling.scorer import BatchScorer

_VERSION = "2"
"""Raised whenever the same reference would give other numbers."""

_BLOCK_PAIRS = 512
"""Pairs that are computed and written together: what an interruption can cost."""

_COLUMNS = pa.schema({"key": pa.binary(16), "chosen": pa.list_(pa.float32()), "rejected": pa.list_(pa.float32())})
_log = logging.getLogger(__name__)

Entry = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Token log-probabilities of a pair's chosen and rejected response."""


def reference_identity(digest: str, accelerator: Accelerator) -> str:
    """Return a digest of everything but the pair that decides a reference log-probability.

    Args:
        digest: The `weights_digest` of the reference.
        accelerator: Decides device and precision.
    """
    return text_digest(_VERSION, digest, accelerator.mixed_precision, accelerator.device.type)


class ReferenceCache:
    """The known log-probabilities of one reference.

    Args:
        identity: Its `reference_identity`.
        batches: Cuts the run's pairs into micro-batches and lays them out.
        accelerator: Knows the ranks and the device.
    """

    def __init__(self, identity: str, batches: Batches, accelerator: Accelerator) -> None:
        self.folder = cache_root() / "reference" / identity[:32]
        self._batches, self._accelerator, self._keys = batches, accelerator, batches.pairs.keys()
        self._schema = _COLUMNS.with_metadata({"reference": identity})
        self._entries: dict[bytes, Entry] = {}
        self._writes = False
        self._read()

    def holds(self, needed: Sequence[int]) -> bool:
        """Tell whether some process knows each of some pairs, given by their indices; then all of them do from now on.

        All processes have to ask.
        """
        known = self._known_by(needed)
        if not known.any(axis=0).all():
            return False
        for block, of_block in _blocks(needed, known):
            self._entries.update(self._told(block, of_block))
        return True

    def complete(self, needed: Sequence[int], scorer: BatchScorer, progress: Callable[[int, int], None]) -> None:
        """Compute and write what is missing, block by block, while no other process does.

        What a block's numbers are depends on the block alone, not on where an earlier attempt was
        interrupted or on the number of ranks: a resumed run finds the same bytes. Every disk has all of them in the
        end, however many the ranks have.

        Args:
            needed: Indices of the pairs that will be looked up, ascending.
            scorer: The reference.
            progress: Called with pairs done and pairs in all.
        """
        # Ranks may have caches of their own, or look at one at different moments.
        if self._known_by(needed).all():
            return
        with self._locked():
            rank = self._accelerator.process_index
            first = first_of_each_disk(self.folder, gather_object)
            # What the disk of the main process refuses is an error, once something is to be written.
            self._writes = rank in (0, first[rank])
            if self._writes:
                self._read()
            done = 0
            for block, known in _blocks(needed, self._known_by(needed)):
                self._keep(self._told(block, known))
                done += len(block)
                unknown = [block[place] for place in np.flatnonzero(~known.any(axis=0)).tolist()]
                missing = list({self._keys[index]: index for index in unknown}.values())
                if missing:
                    self._compute(missing, scorer, progress, done - len(missing), len(needed))
                progress(done, len(needed))

    def lookup(self, batch: PairBatch) -> Tensor:
        """Return the log-probability of each response token of a batch, `[N]`, in nats, on the device.

        A batch that brought them along has them there.
        """
        if batch.reference is not None:
            return batch.reference
        return torch.from_numpy(self.values(batch.pairs)).to(self._accelerator.device)

    def values(self, pairs: Sequence[int]) -> NDArray[np.float32]:
        """Return the log-probability of each response token of some pairs, `[N]`, as `lookup` does."""
        entries = [self._entries[self._keys[index]] for index in pairs]
        return np.concatenate([chosen for chosen, _ in entries] + [rejected for _, rejected in entries])

    def _compute(
        self, missing: Sequence[int], scorer: BatchScorer, progress: Callable[[int, int], None], done: int, total: int
    ) -> None:
        """Score one block, its micro-batches dealt to the ranks, and keep what all of them found.

        Args:
            missing: The pairs of the block that are not known.
            scorer: The reference.
            progress: Called with pairs done and pairs in all.
            done: Pairs that are done before.
            total: Pairs in all.
        """
        mine: list[tuple[bytes, Entry]] = []
        for cut in dealt(self._batches.cut(missing), self._accelerator, lambda now: progress(done + now, total)):
            batch = self._batches(cut)
            tokens = scorer(batch).cpu().split(list(batch.lengths))
            for place, index in enumerate(cut.pairs if not cut.filler else ()):
                entry = tokens[place].numpy().copy(), tokens[len(cut.pairs) + place].numpy().copy()
                mine.append((self._keys[index], entry))
        self._keep(dict(gather_object(mine)))

    def _known_by(self, needed: Sequence[int]) -> NDArray[np.bool_]:
        """Return which rank knows which of some pairs, `[ranks, pairs]`; all ranks have to ask, for the same pairs."""
        known = np.array([self._keys[index] in self._entries for index in needed], np.bool_)
        return np.array(gather_object([known]))

    def _told(self, block: Sequence[int], known: NDArray[np.bool_]) -> dict[bytes, Entry]:
        """Return what this rank does not know of some pairs and another one does, which tells all of them.

        Args:
            block: The pairs.
            known: Which rank knows which of them, `[ranks, pairs]`.
        """
        tells, lacked = known.argmax(axis=0), known.any(axis=0) & ~known.all(axis=0)
        told: dict[bytes, Entry] = {}
        for rank in np.unique(tells[lacked]).tolist():
            own = rank == self._accelerator.process_index
            places = np.flatnonzero(lacked & (tells == rank)).tolist() if own else []
            keys = [self._keys[block[place]] for place in places]
            told |= broadcast_object_list([{key: self._entries[key] for key in keys}], from_process=rank)[0]
        return {key: entry for key, entry in told.items() if key not in self._entries}

    def _keep(self, found: Mapping[bytes, Entry]) -> None:
        """Remember what was computed or told, and write it where no other rank does so for this disk."""
        if found and self._writes:
            self._write(sorted(found.items(), key=lambda item: item[0]))
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
        main = self._accelerator.is_main_process
        try:
            # The main process alone keeps other runs out, and only from its own disk.
            (remove_strays if main else remove_old_strays)(self.folder)
            write_bytes(self.folder / f"{hashlib.sha256(data).hexdigest()}.arrow", data)
        except OSError as error:
            if main:
                raise refused(error, "writing the reference cache", self.folder) from error
            _log.warning("the reference cache in %s is not complete (%s)", self.folder, error.strerror)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let the main process keep other runs out, so that two do not compute the same."""
        lock = locked(self.folder / ".lock", "locking the reference cache", _say_waiting)
        with lock if self._accelerator.is_main_process else contextlib.nullcontext():
            self._accelerator.wait_for_everyone()
            yield

    def _read(self) -> None:
        """Load the folder's files, except those that are damaged or belong to another reference."""
        for path in sorted(self.folder.glob("*.arrow")):
            if reason := self._refusal(path):
                _log.warning("%s of the reference cache %s; computing its pairs again", path.name, reason)
            else:
                with pa.memory_map(str(path)) as source:
                    self._remember(pa.ipc.open_stream(source).read_all())

    def _refusal(self, path: Path) -> str:
        """Return why a file cannot be used, or nothing; one that never can be is removed."""
        reason = "belongs to another reference"
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


def _blocks(needed: Sequence[int], known: NDArray[np.bool_]) -> Iterator[tuple[Sequence[int], NDArray[np.bool_]]]:
    """Yield the pairs that are computed and written together, with the part of a table, `[ranks, pairs]`, on them."""
    for start in range(0, len(needed), _BLOCK_PAIRS):
        block = slice(start, start + _BLOCK_PAIRS)
        yield needed[block], known[:, block]


def _say_waiting(holder: str) -> None:
    """Warn which process this one waits for."""
    _log.warning("waiting for %s, which computes the same reference log-probabilities", holder)
