"""The prepared folder: token ids in Arrow, memory-mapped, with a manifest that says how they came to be.

pairs.arrow      a row for each pair: `columns.SCHEMA`
manifest.json    fingerprint, statistics, sizes and digests
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_cli.data.pairs.renaming import Columns, shown_columns
from dpo_cli.data.pairs.shapes import RankedRule
from dpo_cli.data.pairs.sources import Source, source_digest
from dpo_cli.data.pairs.text_checks import TEXT_CHECKS
from dpo_cli.data.prepared.columns import SCHEMA, SEQUENCES, list_ends, numbers_of_pairs, problem_of_rows
from dpo_cli.data.prepared.manifest import problem_of_manifest
from dpo_cli.data.prepared.step_plan import PairSizes
from dpo_cli.data.records import BadRowRule, TokenizedPair
from dpo_cli.data.rows.fields import listed
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.errors import UserError
from dpo_cli.system.storage import MANIFEST, DamagedFolder, cache_root, text_digest, verify

_VERSION = "8"
"""Raised whenever the same data would become other tokens or another file."""

PAIRS = "pairs.arrow"

_ROW_NUMBER = r":[^:/]*$"
"""What follows a file in the origin of a pair: `pairs.jsonl:17`."""

_OF_A_PAIR = [*SCHEMA.names[: SCHEMA.names.index("flags")]]
"""The columns of which a `TokenizedPair` is made, in its order."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become pairs.

    Attributes:
        format: A name of `FORMATS`, or `auto`: detected for each source.
        on_bad_row: Whether structural errors stop, or their rows are dropped and counted.
        ranked: Which pairs a ranked list becomes.
        columns: The data's column by each name that a shape has for it, where that is another.
        system: The system's turn of conversations that have none, or nothing.
    """

    format: str = "auto"
    on_bad_row: BadRowRule = "error"
    ranked: RankedRule = "extremes"
    columns: Columns = field(default_factory=dict)
    system: str = ""

    @property
    def settings(self) -> dict[str, str | None]:
        """What was set, by the names that users know."""
        return {
            "data.format": self.format,
            "data.on_bad_row": self.on_bad_row,
            "data.ranked": self.ranked,
            "data.columns": shown_columns(dict(sorted(self.columns.items()))) if self.columns else None,
            "data.system": self.system or None,
        }


class PreparedPairs(Sequence[TokenizedPair]):
    """Tokenized pairs on disk; a pair is read when it is asked for.

    Args:
        table: The Arrow table, memory-mapped.
        manifest: What `manifest.json` says.
        files: The files that hold the table, in its order.
    """

    def __init__(self, table: pa.Table, manifest: dict[str, Any], files: Sequence[Path]) -> None:
        self._table, self.manifest, self._files = table, manifest, tuple(files)

    @functools.cached_property
    def sizes(self) -> PairSizes:
        """The tokens of each pair, and which pairs have a prompt in common."""
        prompts, chosen, rejected = (self._of_each[name] for name in SEQUENCES)
        scored = chosen - self._of_each["chosen in gaps"]
        prompt_ids = np.unique(self.key_numbers("prompt_key"), return_inverse=True)[1].reshape(-1)
        return PairSizes(prompts, chosen, rejected, scored, prompt_ids, self._opening(int(prompts.min())))

    @property
    def weights(self) -> NDArray[np.float32]:
        """What the loss of each pair is multiplied by, `[pairs]`."""
        return self._of_each["weight"]

    @property
    def margins(self) -> NDArray[np.float32]:
        """The target margin of each pair, `[pairs]`."""
        return self._of_each["margin"]

    @property
    def flags(self) -> NDArray[np.uint32]:
        """What was found of each pair, `[pairs]`: a bit for each of `TEXT_CHECKS` and `TOKEN_CHECKS`."""
        return self._of_each["flags"]

    @property
    def uncut(self) -> NDArray[np.int64]:
        """The tokens of each pair's prompt and longer response before the length rule cut anything, `[pairs]`."""
        cut_from: NDArray[np.int32] = self._of_each["cut_from"]
        return np.maximum(self.sizes.longest, cut_from)

    def has_gaps(self, name: str) -> NDArray[np.bool_]:
        """Tell which pairs' responses, chosen or rejected, hold tokens that are not scored, `[pairs]`."""
        return self._of_each[f"{name}_gaps"]

    def label(self, name: str, index: int) -> str:
        """Return what a pair is called in one of `LABELS`, or nothing."""
        return str(self._table.column(name)[int(index)].as_py())

    def sources(self) -> tuple[NDArray[np.int64], list[str]]:
        """Return the source of each pair, `[pairs]`, as an index into the names: its label, else the file it is of."""
        label, origin = self._table.column("source"), self._table.column("origin")
        named = pc.if_else(pc.equal(label, ""), pc.replace_substring_regex(origin, _ROW_NUMBER, ""), label)
        encoded = named.combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()

    def origin(self, index: int) -> str:
        """Return where a pair was read."""
        return str(self._table.column("origin")[int(index)].as_py())

    def origin_runs(self) -> NDArray[np.int64]:
        """Number the runs of neighbours that were read at the same place, `[pairs]`."""
        return self._of_each["origin run"]

    def key_numbers(self, name: str) -> NDArray[np.uint64]:
        """Return the first 64 bits of a column of digests, `[pairs]`: enough to find those that are equal."""
        return self._of_each[name]

    @classmethod
    def open(cls, folder: Path) -> PreparedPairs:
        """Map a prepared folder into memory after checking its digests.

        Raises:
            DamagedFolder: The folder is not whole.
        """
        manifest = verify(folder)
        if PAIRS not in manifest["files"]:
            raise DamagedFolder("it has no prepared pairs")
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(folder / PAIRS))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DamagedFolder(f"{PAIRS} cannot be read: {error}") from None
        if table.schema != SCHEMA:
            raise DamagedFolder(f"{PAIRS} was written by another version of the program")
        if problem := problem_of_manifest(manifest, table.num_rows):
            raise DamagedFolder(f"{MANIFEST}: {problem}")
        pairs = cls(table, manifest, [folder / PAIRS])
        for rows in pairs._batches():
            if problem := problem_of_rows(rows):
                raise DamagedFolder(f"{PAIRS}: {problem}")
        return pairs

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        """Return pair `index`, or the pairs of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = [self._table.column(name)[int(index) % len(self)] for name in _OF_A_PAIR]
        tokens = [part.values.to_numpy() for part in row[:3]]
        gaps = [part.values.to_numpy() if len(part) else None for part in row[-2:]]
        return TokenizedPair(*tokens, *(value.as_py() for value in row[3:-2]), *gaps)

    def followed_by(self, other: PreparedPairs) -> PreparedPairs:
        """Return both one after the other, without copying; the manifest stays this one's."""
        table = pa.concat_tables([self._table, other._table])
        return PreparedPairs(table, self.manifest, self._files + other._files)

    def keys(self) -> Sequence[bytes]:
        """Return a digest of each pair's tokens and of nothing else; they stay on disk until one is asked for."""
        return _Keys(self._table.column("key"))

    def heads(self, name: str, width: int) -> NDArray[np.int32]:
        """Return the first tokens of a column, `[pairs, width]`, −1 where it has fewer."""
        return self._window(name, np.arange(width))

    def tails(self, name: str, width: int) -> NDArray[np.int32]:
        """Return the last tokens of a column, `[pairs, width]`, −1 where it has fewer."""
        return self._window(name, np.arange(-width, 0))

    def counts(self, name: str, tokens: Collection[int]) -> NDArray[np.int64]:
        """Return how many of a column's tokens are among some ids, `[pairs]`."""
        counts = []
        for flat, ends in self._stretches(name):
            found = np.concatenate([[0], np.cumsum(np.isin(flat, list(tokens)))])
            counts.append(np.diff(found[ends]))
        return np.concatenate(counts).astype(np.int64)

    def largest_token(self) -> int:
        """Return the largest token id."""
        return max(int(flat.max(initial=0)) for name in SEQUENCES for flat, _ in self._stretches(name))

    def _window(self, name: str, places: NDArray[np.int64]) -> NDArray[np.int32]:
        """Gather tokens at places from the start (≥ 0) or the end (< 0) of every list of a column."""
        windows = []
        for flat, ends in self._stretches(name):
            first, end = ends[:-1, None], ends[1:, None]
            wanted = np.where(places >= 0, first + places, end + places)
            inside = (wanted >= first) & (wanted < end)
            windows.append(np.append(flat, np.int32(-1))[np.where(inside, wanted, len(flat))])
        return np.concatenate(windows)

    @functools.cached_property
    def _of_each(self) -> dict[str, NDArray[Any]]:
        """What is known of every pair in a few bytes, read in one pass."""
        parts, last_origin = [], None
        for batch in self._batches():
            parts.append(numbers_of_pairs(batch, last_origin))
            last_origin = batch.column("origin")[-1].as_py()
        found = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
        found["origin run"] = np.cumsum(found.pop("begins a run"), dtype=np.int64) - 1
        return found

    def _opening(self, shortest: int) -> int:
        """Count the tokens with which all prompts begin alike, up to the length of the shortest."""
        first = self[0].prompt
        for flat, ends in self._stretches("prompt"):
            starts = ends[:-1]
            differing = (place for place in range(shortest) if (flat[starts + place] != first[place]).any())
            shortest = next(differing, shortest)
        return shortest

    def _stretches(self, name: str) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Yield a column a stretch of rows at a time: all their tokens, and where each row's end, 0 before them."""
        for batch in self._batches():
            column = batch.column(name)
            yield column.flatten().to_numpy(), list_ends(column)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Read all pairs a stretch of rows at a time.

        They are read and let go of: of what is mapped, all that was looked at, and more around it, would count as
        this process's memory.
        """
        for file in self._files:
            with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as batches:
                yield from batches

    def num_tokens(self) -> int:
        """Return the tokens of all sequences, each prompt counted with both of its responses."""
        return int((2 * self.sizes.prompts + self.sizes.chosen + self.sizes.rejected).sum())

    def hold_out(self, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split into training and held-out indices; all pairs of one prompt fall on the same side.

        The split depends on what the prompts say, the fraction and the seed: not on the order of the rows, nor on the
        template.
        """
        ranks = np.fromiter(self._ranks(seed), np.dtype(">u8"), len(self))
        order = np.argsort(ranks, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(ranks[order])) + 1, len(order))
        wanted = round(fraction * len(order))
        # Whole prompts, until there are enough.
        held = int(ends[np.searchsorted(ends, wanted)]) if wanted else 0
        return np.sort(order[held:]), np.sort(order[:held])

    def _ranks(self, seed: int) -> Iterator[int]:
        """Yield each pair's place in the order by which prompts are held out."""
        salt = str(seed).encode()
        for batch in self._batches():
            for key in batch.column("prompt_key").to_pylist():
                yield int.from_bytes(hashlib.blake2b(key, key=salt, digest_size=8).digest(), "big")


class _Keys(Sequence[bytes]):
    """A column of digests, read one at a time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        """Return the digest at an index, or those of a slice."""
        if isinstance(index, slice):
            return self._column[index].to_pylist()
        return self._column[int(index)].as_py()


def is_prepared(source: str) -> bool:
    """Tell whether a source names a prepared folder rather than raw data."""
    return any((Path(source) / name).is_file() for name in (PAIRS, MANIFEST))


def fingerprint(sources: Sequence[Source], reading: Reading, tokenize: PairTokenizer) -> str:
    """Return a digest of everything that decides what a prepared folder holds."""
    content = [f"{source.path} {source_digest(source)}" for source in sources]
    checks = [f"{check.name} {check.bit}" for check in (*TEXT_CHECKS, *TOKEN_CHECKS)]
    return text_digest(_VERSION, repr(checks), repr(reading.settings), repr(tokenize.settings), *content)


def default_folder(digest: str) -> Path:
    """Return where data of this fingerprint is kept."""
    return cache_root() / "prepared" / digest[:32]


def find(folder: Path, digest: str) -> tuple[PreparedPairs | None, str]:
    """Open a prepared folder if it is whole and of this fingerprint; else say why not (empty: not there)."""
    if not folder.exists():
        return None, ""
    try:
        pairs = PreparedPairs.open(folder)
    except DamagedFolder as damage:
        return None, f"the prepared data is damaged ({damage})"
    if pairs.manifest["fingerprint"] != digest:
        return None, "the prepared data was made from other data or settings"
    return pairs, ""


def open_for(folder: Path, reading: Reading, tokenize: PairTokenizer) -> PreparedPairs:
    """Open a prepared folder that the user named, if it was made with this tokenizer, template and rules.

    Raises:
        UserError: It is damaged, or was made otherwise.
    """
    hint = "run `dpo prepare-data` again"
    try:
        pairs = PreparedPairs.open(folder)
    except DamagedFolder as damage:
        raise UserError(f"the prepared folder is damaged: {damage}", str(folder), hint) from None
    made, wanted = pairs.manifest["settings"], reading.settings | tokenize.settings
    # The date that a template got is the folder's own.
    if differing := [name for name in wanted if name != "day" and made.get(name) != wanted[name]]:
        what = f"the prepared folder was made with another {listed(differing)}"
        raise UserError(what, str(folder), f"{hint}, or restore the configuration of that time")
    return pairs
