"""The prepared folder: token ids in Arrow, memory-mapped, with a manifest that says how they came to be.

pairs.arrow      prompt, chosen, rejected (token ids), origin, key, prompt_key
manifest.json    fingerprint, statistics, sizes and digests
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_cli.data.formats import FORMATS, Format
from dpo_cli.data.records import BadRow, Pair, TokenizedPair
from dpo_cli.data.schedule import PairSizes
from dpo_cli.data.sources import Row, read_rows, source_digest
from dpo_cli.data.tokenize import PairTokenizer, Tokenized
from dpo_cli.errors import UserError, from_os_error, raise_all
from dpo_cli.storage import MANIFEST, DamagedFolder, cache_root, sealed_folder, text_digest, verify

_VERSION = "2"
"""Raised whenever the same data would become other tokens or another file."""

_PAIRS = "pairs.arrow"
_BATCH_ROWS = 1024
_EXAMPLES = 5
_QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

_SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "chosen": pa.list_(pa.int32()),
        "rejected": pa.list_(pa.int32()),
        "origin": pa.string(),
        "key": pa.binary(16),
        "prompt_key": pa.binary(16),
    }
)

BadRowRule = Literal["error", "drop"]


class PreparedPairs(Sequence[TokenizedPair]):
    """Tokenized pairs on disk; a pair is read when it is asked for.

    Args:
        table: The Arrow table, memory-mapped.
        manifest: What `manifest.json` says.
    """

    def __init__(self, table: pa.Table, manifest: dict[str, Any]) -> None:
        self._table, self.manifest = table, manifest
        self.sizes = PairSizes(
            _lengths(table, "prompt"), _lengths(table, "chosen"), _lengths(table, "rejected"), _prompt_ids(table)
        )

    @classmethod
    def open(cls, folder: Path) -> PreparedPairs:
        """Map a prepared folder into memory after checking its digests.

        Raises:
            DamagedFolder: The folder is not whole.
        """
        manifest = verify(folder)
        if _PAIRS not in manifest["files"] or not {"statistics", "tokenization", "fingerprint"} <= manifest.keys():
            raise DamagedFolder("it does not hold prepared pairs")
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(folder / _PAIRS))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DamagedFolder(f"{_PAIRS} cannot be read: {error}") from None
        if table.schema != _SCHEMA:
            raise DamagedFolder(f"{_PAIRS} was written by another version of the program")
        return cls(table, manifest)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        """Return pair `index`, or the pairs of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = [self._table.column(name)[int(index) % len(self)] for name in _SCHEMA.names[:4]]
        prompt, chosen, rejected = (tokens.values.to_numpy() for tokens in row[:3])
        return TokenizedPair(prompt, chosen, rejected, row[3].as_py())

    def followed_by(self, other: PreparedPairs) -> PreparedPairs:
        """Return both one after the other, without copying; the manifest stays this one's."""
        return PreparedPairs(pa.concat_tables([self._table, other._table]), self.manifest)

    def keys(self) -> list[bytes]:
        """Return a digest of each pair's tokens."""
        return list(self._table.column("key").to_pylist())

    def heads(self, name: str, width: int) -> NDArray[np.int32]:
        """Return the first tokens of a column, `[pairs, width]`, −1 where it has fewer."""
        return self._window(name, np.arange(width))

    def tails(self, name: str, width: int) -> NDArray[np.int32]:
        """Return the last tokens of a column, `[pairs, width]`, −1 where it has fewer."""
        return self._window(name, np.arange(-width, 0))

    def counts(self, name: str, tokens: Collection[int]) -> NDArray[np.int64]:
        """Return how many of a column's tokens are among some ids, `[pairs]`."""
        flat = pc.list_flatten(self._table.column(name)).to_numpy()
        found = np.concatenate([[0], np.cumsum(np.isin(flat, list(tokens)))])
        ends = np.cumsum(_lengths(self._table, name))
        return np.asarray(found[ends] - found[ends - _lengths(self._table, name)], dtype=np.int64)

    def largest_token(self) -> int:
        """Return the largest token id."""
        return max(int(pc.max(pc.list_flatten(self._table.column(n))).as_py()) for n in _SCHEMA.names[:3])

    def _window(self, name: str, places: NDArray[np.int64]) -> NDArray[np.int32]:
        """Gather tokens at places from the start (≥ 0) or the end (< 0) of every list of a column."""
        lengths = _lengths(self._table, name)
        ends = np.cumsum(lengths)
        wanted = np.where(places >= 0, (ends - lengths)[:, None] + places, ends[:, None] + places)
        inside = (wanted >= (ends - lengths)[:, None]) & (wanted < ends[:, None])
        flat = pc.list_flatten(self._table.column(name)).to_numpy()
        return np.where(inside, flat[np.clip(wanted, 0, len(flat) - 1)], -1).astype(np.int32)

    def num_tokens(self) -> int:
        """Return the tokens of all sequences, each prompt counted with both of its responses."""
        return int((2 * self.sizes.prompts + self.sizes.chosen + self.sizes.rejected).sum())

    def hold_out(self, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split into training and held-out indices; all pairs of one prompt fall on the same side.

        The split depends on the prompts' tokens, the fraction and the seed, not on the order of the rows.
        """
        prompts = self._table.column("prompt_key").to_pylist()
        salt = str(seed).encode()
        ranks = [hashlib.blake2b(key, key=salt, digest_size=8).digest() for key in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (ranks[i], i))
        wanted, held = round(fraction * len(order)), 0
        for _, group in itertools.groupby(order, key=lambda i: ranks[i]):
            if held >= wanted:
                break
            held += len(list(group))
        return np.sort(np.array(order[held:], np.int64)), np.sort(np.array(order[:held], np.int64))


def is_prepared(source: str) -> bool:
    """Tell whether a source names a prepared folder rather than raw data."""
    return any((Path(source) / name).is_file() for name in (_PAIRS, MANIFEST))


def fingerprint(sources: Sequence[str], data_format: str, on_bad_row: BadRowRule, tokenize: PairTokenizer) -> str:
    """Return a digest of everything that decides what a prepared folder holds."""
    content = [f"{source} {source_digest(source)}" for source in sources]
    return text_digest(_VERSION, data_format, on_bad_row, repr(tokenize.settings), *content)


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
        return None, "the prepared data is of other data or settings"
    return pairs, ""


def open_for(folder: Path, tokenize: PairTokenizer) -> PreparedPairs:
    """Open a prepared folder that the user named, if it was made with this tokenizer, template and rule.

    Raises:
        UserError: It is damaged, or was made otherwise.
    """
    hint = "run `dpo prepare-data` again"
    try:
        pairs = PreparedPairs.open(folder)
    except DamagedFolder as damage:
        raise UserError(f"the prepared folder is damaged: {damage}", str(folder), hint) from None
    made, wanted = pairs.manifest["tokenization"], tokenize.settings
    if differing := [name for name in wanted if made.get(name) != wanted[name]]:
        what = f"the prepared folder was made with another {', '.join(differing)}"
        raise UserError(what, str(folder), f"{hint}, or set the configuration to what it was then")
    return pairs


def prepare(
    sources: Sequence[str],
    data_format: str,
    on_bad_row: BadRowRule,
    tokenize: PairTokenizer,
    folder: Path,
) -> PreparedPairs:
    """Read, check and tokenize all rows of the sources into a folder, and open it.

    Args:
        sources: Data files, folders or Hub ids, in order.
        data_format: A name of `FORMATS`, or `auto`.
        on_bad_row: Whether structural errors stop, or their rows are dropped and counted.
        tokenize: The template and the length rule.
        folder: Where the prepared folder shall stand; an older one is replaced.

    Raises:
        UserError: A source cannot be read, rows are broken under `error`, or nothing is left.
    """
    digest = fingerprint(sources, data_format, on_bad_row, tokenize)
    to_pair = FORMATS["instruction" if data_format == "auto" else data_format]
    facts: dict[str, Any] = {
        "fingerprint": digest,
        "sources": list(sources),
        "tokenization": tokenize.settings,
    }
    try:
        _fill(folder, facts, sources, to_pair, on_bad_row, tokenize)
    except OSError as error:
        raise from_os_error(error, "preparing the data", str(folder)) from error
    return PreparedPairs.open(folder)


def _fill(
    folder: Path,
    facts: dict[str, Any],
    sources: Sequence[str],
    to_pair: Format,
    on_bad_row: BadRowRule,
    tokenize: PairTokenizer,
) -> None:
    """Write the sealed folder; what was found joins its manifest's facts."""
    tally = _Tally()
    with sealed_folder(folder, facts) as temporary:
        with pa.OSFile(str(temporary / _PAIRS), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            rows = itertools.chain.from_iterable(read_rows(source) for source in sources)
            while batch := list(itertools.islice(rows, _BATCH_ROWS)):
                pairs = list(_checked(batch, to_pair, tally))
                if tally.broken and on_bad_row == "error":
                    continue
                if kept := list(_tokenized(pairs, tokenize, tally)):
                    writer.write_batch(_record_batch(kept))
        tally.judge(on_bad_row, sources)
        facts["statistics"] = tally.statistics()


@dataclass
class _Tally:
    """What was found while reading: counts by reason, a few examples of each, lengths."""

    num_read: int = 0
    truncated: int = 0
    joined: int = 0
    broken: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    broken_examples: list[UserError] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "chosen": [], "rejected": []})

    def drop(self, origin: str, bad: BadRow) -> None:
        """Count a row that does not become a pair."""
        self.dropped[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < _EXAMPLES:
            shown.append(f"{origin}: {bad.detail}")
        if bad.structural:
            self.broken += 1
            if len(self.broken_examples) < _EXAMPLES:
                self.broken_examples.append(UserError(bad.detail, origin, _how_to_mend(bad)))

    def keep(self, pair: TokenizedPair) -> None:
        """Note the lengths of a pair that was kept."""
        for name, lengths in self.lengths.items():
            lengths.append(len(getattr(pair, name)))

    def judge(self, on_bad_row: BadRowRule, sources: Sequence[str]) -> None:
        """Stop where the data is broken, or nothing is left of it."""
        where = ", ".join(sources)
        if self.num_read > _EXAMPLES and self.dropped == {"missing field": self.num_read}:
            hint = "the rows have another shape: they need text in `instruction`, `chosen` and `rejected`"
            what = f"none of {self.num_read} rows can be used: {self.examples['missing field'][0]}"
            raise UserError(what, where, hint)
        if self.broken and on_bad_row == "error":
            counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
            summary = f"{self.broken} of {self.num_read} rows cannot be used (found: {counts})"
            first = f"the first {len(self.broken_examples)} are named above" if self.broken > _EXAMPLES else None
            raise_all([*self.broken_examples, UserError(summary, where, first)])
        if not self.num_read:
            raise UserError("there are no rows", where, "a data file holds at least one row")
        if not self.lengths["prompt"]:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
            hint = f"see {next(iter(self.examples.values()))[0]}"
            raise UserError(f"none of {self.num_read} rows is left: {counts}", where, hint)

    def statistics(self) -> dict[str, Any]:
        """Return what the manifest says of the reading."""
        return {
            "rows_read": self.num_read,
            "pairs_kept": len(self.lengths["prompt"]),
            "dropped": dict(self.dropped.most_common()),
            "examples": self.examples,
            "truncated": self.truncated,
            "joined_at_boundary": self.joined,
            "tokens": {name: _quantiles(lengths) for name, lengths in self.lengths.items()},
        }


def _how_to_mend(bad: BadRow) -> str:
    """Say what to do about a row that stops the reading."""
    drop = "set `data.on_bad_row: drop` to leave such rows out (counted)"
    if bad.reason == "too long":
        return "raise `data.max_length`, or set `data.on_too_long` to drop or truncate"
    if bad.reason == "template error":
        return "mend the template, or set `model.chat_template` to another one"
    if bad.reason == "missing field":
        return f"a row needs text in `instruction`, `chosen` and `rejected`: mend the row, or {drop}"
    if "not UTF-8" in bad.detail:
        return f"save the file as UTF-8, or {drop}"
    return f"mend the row, or {drop}"


def _checked(rows: Iterable[Row], to_pair: Format, tally: _Tally) -> Iterator[Pair]:
    """Yield the rows that are pairs; count the others."""
    for row in rows:
        tally.num_read += 1
        try:
            if row.values is None:
                raise BadRow("undecodable row", row.problem)
            yield to_pair(row.values, row.origin)
        except BadRow as bad:
            tally.drop(row.origin, bad)


def _tokenized(pairs: Sequence[Pair], tokenize: PairTokenizer, tally: _Tally) -> Iterator[Tokenized]:
    """Yield the pairs that tokenize within the length rule; count the others."""
    for pair, result in zip(pairs, tokenize(pairs), strict=True):
        if isinstance(result, BadRow):
            tally.drop(pair.origin, result)
            continue
        if np.array_equal(result.pair.chosen, result.pair.rejected):
            same = BadRow("identical responses", "both responses become the same tokens", structural=False)
            tally.drop(pair.origin, same)
            continue
        tally.truncated += result.truncated
        tally.joined += result.joined
        tally.keep(result.pair)
        yield result


def _record_batch(kept: Sequence[Tokenized]) -> pa.RecordBatch:
    pairs = [result.pair for result in kept]
    columns: dict[str, list[Any]] = {
        "prompt": [pair.prompt for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
        "origin": [pair.origin for pair in pairs],
        "key": [_key(pair.prompt, pair.chosen, pair.rejected) for pair in pairs],
        "prompt_key": [_key(result.whole_prompt) for result in kept],
    }
    arrays = [pa.array(columns[name], _SCHEMA.field(name).type) for name in _SCHEMA.names]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _key(*sequences: NDArray[np.int32]) -> bytes:
    """Digest token sequences; where one ends and the next begins matters."""
    whole = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        whole.update(len(tokens).to_bytes(8, "little"))
        whole.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return whole.digest()


def _lengths(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(pc.list_value_length(table.column(name)).to_numpy(), dtype=np.int64)


def _prompt_ids(table: pa.Table) -> NDArray[np.int64]:
    """Number the prompts, equal ones alike, `[pairs]`."""
    keys = table.column("prompt_key").combine_chunks()
    return np.asarray(keys.dictionary_encode().indices.to_numpy(zero_copy_only=False), dtype=np.int64)


def _quantiles(lengths: list[int]) -> dict[str, float]:
    values = np.array(lengths)
    found = {name: int(np.quantile(values, q, method="nearest")) for name, q in _QUANTILES.items()}
    return {**found, "mean": round(float(values.mean()), 1)}
