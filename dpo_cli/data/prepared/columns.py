"""The columns of prepared pairs in Arrow: which there are, what they must not hold, and numbers read off them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_cli.data.rows.fields import printable

SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "chosen": pa.list_(pa.int32()),
        "rejected": pa.list_(pa.int32()),
        "origin": pa.string(),
        "weight": pa.float32(),
        "margin": pa.float32(),
        "source": pa.string(),
        "category": pa.string(),
        "chosen_gaps": pa.list_(pa.int32()),
        "rejected_gaps": pa.list_(pa.int32()),
        "flags": pa.uint32(),
        "cut_from": pa.int32(),
        "key": pa.binary(16),
        "prompt_key": pa.binary(16),
        "either_key": pa.binary(16),
    }
)
"""A row for each pair.

The token ids of prompt, chosen and rejected, and which tokens of the responses are not scored (`gaps`); where it was
read; weight, margin, source and category; what was noticed of its texts and done to it (`flags`); how long it was
before it was cut, if it was (`cut_from`); and digests by which pairs are compared: of all its tokens (`key`), of its
prompt (`prompt_key`), and of its tokens whichever response is the better one (`either_key`).
"""

SEQUENCES = ("prompt", "chosen", "rejected")


def problem_of_rows(rows: pa.RecordBatch) -> str:
    """Say what is wrong with some rows of `SCHEMA`, or nothing: digests say that a file is whole, not who wrote it."""
    try:
        # Arrow follows a file's offsets unchecked; false ones lead out of its memory.
        rows.validate(full=True)
    except pa.ArrowException as error:
        return printable(error, 200)
    tokens = [rows.column(name) for name in SEQUENCES]
    gaps = [rows.column(name) for name in ("chosen_gaps", "rejected_gaps")]
    if any(column.null_count for column in (*rows.columns, *(column.flatten() for column in (*tokens, *gaps)))):
        return "values are missing"
    if any((np.diff(list_ends(column)) < 1).any() or (column.flatten().to_numpy() < 0).any() for column in tokens):
        return "there are texts without tokens, or tokens below 0"
    if not all(map(_are_within, gaps, tokens[1:])):
        return "tokens that are not scored lie outside of their response"
    weights, margins = rows.column("weight").to_numpy(), rows.column("margin").to_numpy()
    if not (np.isfinite(weights) & (weights >= 0) & np.isfinite(margins)).all():
        return "weights or margins are not valid numbers"
    return ""


def _are_within(gaps: pa.ListArray, responses: pa.ListArray) -> bool:
    """Tell whether gaps are starts and stops in ascending order, none of them behind the end of their response."""
    edges, counts = gaps.flatten().to_numpy(), np.diff(list_ends(gaps))
    rows = np.repeat(np.arange(len(counts)), counts)
    ascending = (np.diff(edges) >= 0) | (np.diff(rows) > 0)
    inside = (edges >= 0) & (edges <= np.diff(list_ends(responses))[rows])
    return bool((counts % 2 == 0).all() and ascending.all() and inside.all())


def numbers_of_pairs(batch: pa.RecordBatch, origin_before: str | None) -> dict[str, NDArray[Any]]:
    """Return numbers of every pair in a stretch of rows, `[rows]` each and none of them a view.

    They are: the tokens of the three sequences, under the sequence's name; the chosen response's tokens that are not
    scored; whether responses have gaps; the columns that are numbers; the first 64 bits of each digest; and whether a
    row was read at another place than the one before.
    """
    columns = {name: batch.column(name) for name in SCHEMA.names}
    origins = columns["origin"]
    inner = pc.not_equal(origins.slice(1), origins.slice(0, len(origins) - 1)).to_numpy(zero_copy_only=False)
    return {
        **{name: np.diff(list_ends(columns[name])) for name in SEQUENCES},
        "chosen in gaps": _in_gaps(columns["chosen_gaps"]),
        **{name: np.diff(list_ends(columns[name])) > 0 for name in ("chosen_gaps", "rejected_gaps")},
        **{name: columns[name].to_numpy().copy() for name in ("weight", "margin", "flags", "cut_from")},
        **{name: _first_halves(columns[name]) for name in ("key", "prompt_key", "either_key")},
        "begins a run": np.concatenate([[origins[0].as_py() != origin_before], inner]),
    }


def _in_gaps(gaps: pa.ListArray) -> NDArray[np.int64]:
    """Count the tokens of each response that are not scored."""
    flat = gaps.flatten().to_numpy()
    signed = np.where(np.arange(len(flat)) % 2, flat, -flat)
    return np.diff(np.concatenate([[0], np.cumsum(signed, dtype=np.int64)])[list_ends(gaps)])


def _first_halves(digests: pa.FixedSizeBinaryArray) -> NDArray[np.uint64]:
    """Return the first 64 bits of digests of 16 bytes."""
    whole = np.frombuffer(digests.buffers()[1], np.uint64, 2 * len(digests), 16 * digests.offset)
    return whole[::2].copy()


def list_ends(lists: pa.Array) -> NDArray[np.int64]:
    """Return where each list ends among all elements, 0 before them."""
    return np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(), dtype=np.int64)])
