"""Rows become a prepared folder: read once, checked and tokenized a portion at a time, written as they come.

What is in memory does not grow with the rows: a few portions on their way, and a tally.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.data.formats import FORMATS, Format, read_pair
from dpo_cli.data.prepared import PAIRS, SCHEMA, BadRowRule, PreparedPairs, fingerprint
from dpo_cli.data.records import BadRow, Pair, Tokens
from dpo_cli.data.sources import Row, read_rows
from dpo_cli.data.tally import Tally
from dpo_cli.data.tokenize import PairTokenizer, Tokenized
from dpo_cli.data.workers import in_order, num_cores
from dpo_cli.errors import from_os_error
from dpo_cli.storage import sealed_folder

_PORTION_ROWS = 1024
"""Rows that are checked, tokenized and written together: a record batch of the file."""

_RUN_ROWS = 256
"""Rows that are checked and tokenized in one go: more at once leave the processor's caches."""

_PORTIONS_ALONE = 8
"""Portions that are made before worker processes are started: as long as it takes to start them."""


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
    shape = FORMATS["instruction" if data_format == "auto" else data_format]
    facts: dict[str, Any] = {
        "fingerprint": fingerprint(sources, data_format, on_bad_row, tokenize),
        "sources": list(sources),
        "tokenization": tokenize.settings,
    }
    make = _MakePortion(shape, tokenize, stops=on_bad_row == "error")
    try:
        _fill(folder, facts, sources, make, on_bad_row)
    except OSError as error:
        raise from_os_error(error, "preparing the data", str(folder)) from error
    return PreparedPairs.open(folder)


@dataclass(frozen=True, slots=True)
class _Portion:
    """What some rows came to.

    Attributes:
        checked: What was found before tokenizing.
        tokenized: What was found by tokenizing.
        batch: The pairs that are kept, or None where there are none.
    """

    checked: Tally
    tokenized: Tally
    batch: pa.RecordBatch | None


@dataclass(frozen=True)
class _MakePortion:
    """Makes a portion of rows: in this process or, pickled, in a worker."""

    shape: Format
    tokenize: PairTokenizer
    stops: bool

    def __call__(self, rows: Sequence[Row]) -> _Portion:
        """Check and tokenize; broken rows that stop the reading are reason enough not to tokenize what follows."""
        checked, tokenized = Tally(), Tally()
        kept: list[Tokenized] = []
        for start in range(0, len(rows), _RUN_ROWS):
            pairs = list(_checked(rows[start : start + _RUN_ROWS], self.shape, checked))
            if not (self.stops and checked.broken):
                kept += _tokenized(pairs, self.tokenize, tokenized)
        return _Portion(checked, tokenized, _record_batch(kept) if kept else None)


def _fill(
    folder: Path, facts: dict[str, Any], sources: Sequence[str], make: _MakePortion, on_bad_row: BadRowRule
) -> None:
    """Write the sealed folder; what was found joins its manifest's facts."""
    tally = Tally()
    rows = itertools.chain.from_iterable(read_rows(source) for source in sources)
    runs = iter(lambda: list(itertools.islice(rows, _PORTION_ROWS)), [])
    portions = in_order(make, runs, num_workers=_num_workers(make.tokenize), num_alone=_PORTIONS_ALONE)
    with sealed_folder(folder, facts) as temporary:
        with (
            contextlib.closing(portions),
            pa.OSFile(str(temporary / PAIRS), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
        ):
            for portion in portions:
                tally.add(portion.checked)
                if make.stops and tally.broken:
                    continue
                tally.add(portion.tokenized)
                if portion.batch is not None:
                    writer.write_batch(portion.batch)
        tally.judge(on_bad_row, sources)
        facts["statistics"] = tally.statistics()


def _num_workers(tokenize: PairTokenizer) -> int:
    """Use all cores; but a tokenizer in Python may hold what cannot be sent to another process."""
    return num_cores() if getattr(tokenize.tokenizer, "backend_tokenizer", None) else 1


def _checked(rows: Iterable[Row], shape: Format, tally: Tally) -> Iterator[Pair]:
    """Yield the rows that are pairs; count the others."""
    for row in rows:
        tally.num_read += 1
        try:
            if row.values is None:
                raise BadRow("undecodable row", row.problem)
            yield read_pair(shape, row.values, row.origin)
        except BadRow as bad:
            tally.drop(row.origin, bad)


def _tokenized(pairs: Sequence[Pair], tokenize: PairTokenizer, tally: Tally) -> Iterator[Tokenized]:
    """Yield the pairs that tokenize within the length rule; count the others."""
    for pair, result in zip(pairs, tokenize(pairs), strict=True):
        if isinstance(result, BadRow):
            tally.drop(pair.origin, result)
            continue
        if result.pair.chosen.tobytes() == result.pair.rejected.tobytes():
            same = BadRow("identical responses", "both responses become the same tokens", structural=False)
            tally.drop(pair.origin, same)
            continue
        tally.truncated += result.truncated
        tally.joined += result.joined
        tally.keep(result.pair)
        yield result


def _record_batch(kept: Sequence[Tokenized]) -> pa.RecordBatch:
    pairs = [result.pair for result in kept]
    columns = [
        _token_lists([pair.prompt for pair in pairs]),
        _token_lists([pair.chosen for pair in pairs]),
        _token_lists([pair.rejected for pair in pairs]),
        pa.array([pair.origin for pair in pairs], SCHEMA.field("origin").type),
        pa.array([pair.weight for pair in pairs], SCHEMA.field("weight").type),
        pa.array([pair.margin for pair in pairs], SCHEMA.field("margin").type),
        pa.array([_key(pair.prompt, pair.chosen, pair.rejected) for pair in pairs], SCHEMA.field("key").type),
        pa.array([_key(result.whole_prompt) for result in kept], SCHEMA.field("prompt_key").type),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _token_lists(tokens: Sequence[Tokens]) -> pa.Array:
    """Put token sequences into one Arrow column."""
    ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(tokens)))


def _key(*sequences: NDArray[np.int32]) -> bytes:
    """Digest token sequences; where one ends and the next begins matters."""
    whole = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        whole.update(len(tokens).to_bytes(8, "little"))
        whole.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    return whole.digest()
