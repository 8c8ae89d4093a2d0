"""Rows become a prepared folder: read once, checked and tokenized a portion at a time, written as they come.

What is in memory does not grow with the rows: a few portions on their way, and a tally.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.data.pairs.detection import DETECTION_ROWS, detect
from dpo_cli.data.pairs.renaming import check_columns, renamed
from dpo_cli.data.pairs.shapes import FORMATS, read_pairs
from dpo_cli.data.pairs.sources import Source, describe, read_rows, weighted
from dpo_cli.data.pairs.text_checks import text_flags
from dpo_cli.data.prepared.columns import SCHEMA
from dpo_cli.data.prepared.folder import PAIRS, PreparedPairs, Reading, fingerprint
from dpo_cli.data.prepared.tally import Tally
from dpo_cli.data.records import LABELS, NUMBERS, BadRow, Gaps, Pair, Row, TokenizedPair, Tokens, total_tokens
from dpo_cli.data.tokens.token_checks import token_flags
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from dpo_cli.data.tokens.unwritten import UNWRITTEN
from dpo_cli.errors import UserError
from dpo_cli.system.storage import refused, remove_old_strays, remove_strays_of, sealed_folder
from dpo_cli.system.workers import in_order, num_cores

_PORTION_ROWS = 1024
"""Rows that are checked, tokenized and written together: a record batch of the file."""

_RUN_ROWS = 256
"""Rows that are checked and tokenized in one go: more at once leave the processor's caches."""

_SECONDS_ALONE = 2.0
"""How long portions are made before worker processes are started: about as long as it takes to start them."""


_SCRATCH = ".scratch"
"""Where rows wait within the folder that is being written; it is gone before the folder is whole."""

_NO_GAPS = np.empty(0, np.int32)

_AS_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True, default=str)


def prepare(sources: Sequence[Source], reading: Reading, tokenize: PairTokenizer, folder: Path) -> PreparedPairs:
    """Read, check and tokenize all rows of the sources into a folder, and open it.

    Args:
        sources: Where rows come from, in order.
        reading: How rows become pairs.
        tokenize: The template and the length rule.
        folder: The path of the prepared folder; an older one is replaced.

    Raises:
        UserError: A source cannot be read, or has no shape that is known; rows are broken under `error`, or nothing
            is left.
    """
    facts: dict[str, Any] = {
        "fingerprint": fingerprint(sources, reading, tokenize),
        "sources": [describe([source]) for source in sources],
        "settings": reading.settings | tokenize.settings,
    }
    try:
        remove_old_strays(folder.parent)
        remove_strays_of(folder)
        _fill(folder, facts, sources, reading, tokenize)
    except OSError as error:
        raise refused(error, "preparing the data", folder) from error
    return PreparedPairs.open(folder)


def read_again(sources: Sequence[Source], reading: Reading, origins: Collection[str]) -> dict[str, Pair]:
    """Return pairs as they are before they become tokens, by where they were read.

    Args:
        sources: Where their rows come from.
        reading: How rows become pairs.
        origins: Where the pairs that are wanted were read.

    Raises:
        UserError: A source cannot be read.
    """
    found: dict[str, Pair] = {}
    shapes: list[dict[str, Any]] = [{} for _ in sources]
    with tempfile.TemporaryDirectory() as scratch:
        for some in _runs(sources, reading, shapes, Path(scratch)):
            for pair, _ in itertools.chain.from_iterable(
                _checked(some, start, reading, Tally()) for start in range(0, len(some.rows), _RUN_ROWS)
            ):
                if pair.origin in origins:
                    found.setdefault(pair.origin, pair)
            if len(found) == len(origins):
                break
    return found


class _Rows(NamedTuple):
    """Some rows of one source."""

    source: int
    shape: str
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class _Portion:
    """What some rows came to.

    Attributes:
        source: The number of the source that they are of.
        checked: What was found before tokenizing.
        tokenized: What was found by tokenizing.
        batch: The pairs that are kept, or None where there are none.
    """

    source: int
    checked: Tally
    tokenized: Tally
    batch: pa.RecordBatch | None


@dataclass(frozen=True)
class _MakePortion:
    """Makes a portion of rows: in this process or, pickled, in a worker."""

    reading: Reading
    tokenize: PairTokenizer

    @property
    def stops(self) -> bool:
        """Whether a broken row stops the reading."""
        return self.reading.on_bad_row == "error"

    def __call__(self, some: _Rows) -> _Portion:
        """Check and tokenize; broken rows that stop the reading are reason enough not to tokenize what follows."""
        checked, tokenized = Tally(), Tally()
        kept: list[_Kept] = []
        for start in range(0, len(some.rows), _RUN_ROWS):
            pairs = list(_checked(some, start, self.reading, checked))
            if not (self.stops and checked.broken):
                kept += _tokenized(pairs, self.tokenize, tokenized)
        return _Portion(some.source, checked, tokenized, _record_batch(kept) if kept else None)


def _fill(
    folder: Path, facts: dict[str, Any], sources: Sequence[Source], reading: Reading, tokenize: PairTokenizer
) -> None:
    """Write the sealed folder; what was found joins its manifest's facts."""
    tally, all_tokens = Tally(), hashlib.sha256()
    read: list[dict[str, Any]] = [
        {"source": describe([source]), "shape": "", "rows": 0, "pairs": 0} for source in sources
    ]
    make = _MakePortion(reading, tokenize)
    with sealed_folder(folder, facts) as temporary:
        runs = _runs(sources, reading, read, temporary / _SCRATCH)
        portions = in_order(make, runs, num_workers=_num_workers(tokenize), seconds_alone=_SECONDS_ALONE)
        with (
            contextlib.closing(portions),
            pa.OSFile(str(temporary / PAIRS), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
        ):
            for portion in portions:
                tally.add(portion.checked)
                read[portion.source]["rows"] += portion.checked.num_read
                if make.stops and tally.broken:
                    continue
                tally.add(portion.tokenized)
                read[portion.source]["pairs"] += portion.tokenized.num_kept
                if portion.batch is not None:
                    writer.write_batch(portion.batch)
                    all_tokens.update(b"".join(portion.batch.column("key").to_pylist()))
        tally.judge(reading.on_bad_row, describe(sources))
        shutil.rmtree(temporary / _SCRATCH, ignore_errors=True)
        facts["statistics"] = {"sources": read, **tally.statistics()}
        # Of the same pairs in the same order, whatever files and shapes they came from, this is the same.
        facts["tokens"] = all_tokens.hexdigest()


def _runs(sources: Sequence[Source], reading: Reading, read: list[dict[str, Any]], scratch: Path) -> Iterator[_Rows]:
    """Yield the rows of all sources, some at a time; the shape that each has is put into `read`."""
    for number, source in enumerate(sources):
        rows = _named(read_rows(source), source, reading)
        first = list(itertools.islice(rows, DETECTION_ROWS))
        if not first:
            raise UserError("there are no rows", source.path, "name a source that has rows")
        asked = source.format if source.format != "auto" else reading.format
        name = read[number]["shape"] = detect(first, source.path) if asked == "auto" else asked
        rows = itertools.chain(first, rows)
        if gather := FORMATS[name].gather:
            folder = scratch / str(number)
            folder.mkdir(parents=True)
            rows = gather(rows, folder)
        rows = weighted(rows, source.weight)
        while run := list(itertools.islice(rows, _PORTION_ROWS)):
            yield _Rows(number, name, run)


def _named(rows: Iterator[Row], source: Source, reading: Reading) -> Iterator[Row]:
    """Yield rows with their columns under the names that shapes know, and the system's turn that goes before them."""
    columns = reading.columns if source.columns is None else source.columns
    system = reading.system if source.system is None else source.system
    if not columns and not system.strip():
        return rows
    first = list(itertools.islice(rows, DETECTION_ROWS))
    check_columns(first, columns, source.path)
    return renamed(itertools.chain(first, rows), columns, system if system.strip() else "")


def _num_workers(tokenize: PairTokenizer) -> int:
    """Use all cores; but a tokenizer in Python may hold what cannot be sent to another process."""
    return num_cores() if getattr(tokenize.tokenizer, "backend_tokenizer", None) else 1


def _checked(some: _Rows, start: int, reading: Reading, tally: Tally) -> Iterator[tuple[Pair, bool]]:
    """Yield the pairs of a run of rows, and whether their row is a copy; count the rows that are none."""
    for row in some.rows[start : start + _RUN_ROWS]:
        tally.num_read += row.num_rows
        try:
            for pair in read_pairs(FORMATS[some.shape], row, reading.ranked):
                yield pair, row.copy
        except BadRow as bad:
            tally.drop(row.origin, bad)


class _Kept(NamedTuple):
    """A pair that is kept, what was noticed of it, and a digest of its prompt."""

    result: Tokenized
    flags: int
    prompt_key: bytes


def _tokenized(pairs: Sequence[tuple[Pair, bool]], tokenize: PairTokenizer, tally: Tally) -> Iterator[_Kept]:
    """Yield the pairs that tokenize within the length rule; count the others."""
    for (pair, copy), result in zip(pairs, tokenize([pair for pair, _ in pairs]), strict=True):
        if isinstance(result, BadRow):
            tally.drop(pair.origin, result, copy=copy)
            continue
        if result.pair.chosen.tobytes() == result.pair.rejected.tobytes():
            detail = "both responses become the same tokens"
            if titles := [UNWRITTEN[name].title for name in sorted(result.unwritten & UNWRITTEN.keys())]:
                detail += f": {', and '.join(titles)}"
            same = BadRow("identical responses", detail, structural=False, lengths=result.uncut)
            tally.drop(pair.origin, same, copy=copy)
            continue
        tally.keep(result)
        yield _Kept(result, text_flags(pair) | token_flags(result), _prompt_key(pair))


def _record_batch(kept: Sequence[_Kept]) -> pa.RecordBatch:
    pairs = [one.result.pair for one in kept]
    columns: dict[str, pa.Array | list[Any]] = {
        "prompt": _token_lists([pair.prompt for pair in pairs]),
        "chosen": _token_lists([pair.chosen for pair in pairs]),
        "rejected": _token_lists([pair.rejected for pair in pairs]),
        **{name: [getattr(pair, name) for pair in pairs] for name in ("origin", *NUMBERS, *LABELS)},
        "chosen_gaps": _token_lists([_or_none(pair.chosen_gaps) for pair in pairs]),
        "rejected_gaps": _token_lists([_or_none(pair.rejected_gaps) for pair in pairs]),
        "flags": [one.flags for one in kept],
        "cut_from": [total_tokens(one.result.uncut) if one.result.uncut else 0 for one in kept],
        "key": [_pair_key(pair) for pair in pairs],
        "prompt_key": [one.prompt_key for one in kept],
        "either_key": [_either_key(pair) for pair in pairs],
    }
    return pa.record_batch(
        [
            column if isinstance(column, pa.Array) else pa.array(column, SCHEMA.field(name).type)
            for name, column in columns.items()
        ],
        schema=SCHEMA,
    )


def _or_none(gaps: Gaps | None) -> Gaps:
    return _NO_GAPS if gaps is None else gaps


def _prompt_key(pair: Pair) -> bytes:
    """Digest the messages of a prompt: they are the same under every template, and on every day."""
    messages = [[message.role, message.text, message.extras] for message in pair.prompt]
    return hashlib.blake2b(_AS_JSON.encode([messages, pair.arguments]).encode(), digest_size=16).digest()


def _pair_key(pair: TokenizedPair) -> bytes:
    """Digest what a model sees of a pair and what is scored of it."""
    gaps = _or_none(pair.chosen_gaps), _or_none(pair.rejected_gaps)
    return _key(pair.prompt, pair.chosen, pair.rejected, *gaps)


def _either_key(pair: TokenizedPair) -> bytes:
    """Digest a pair's tokens so that it does not matter which response is the better one."""
    return _key(pair.prompt, *sorted((pair.chosen, pair.rejected), key=lambda tokens: tokens.tobytes()))


def _token_lists(tokens: Sequence[Tokens]) -> pa.Array:
    """Put token sequences into one Arrow column."""
    ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(tokens).astype(np.int32, copy=False)))


def _key(*sequences: NDArray[np.int32]) -> bytes:
    """Digest token sequences; where one ends and the next begins matters."""
    whole = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        whole.update(len(tokens).to_bytes(8, "little"))
        whole.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return whole.digest()
