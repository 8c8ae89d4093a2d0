"""What a prepared folder must be like to be believed: digests say that it is whole, not who made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dpo_cli.data.prepared.tally import COUNTED, QUANTILES
from dpo_cli.data.rows.fields import printable

_Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Facts(BaseModel):
    """Facts of which none is made to fit; more beside them do no harm."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Quantiles(_Facts):
    prompt: dict[str, float]
    chosen: dict[str, float]
    rejected: dict[str, float]

    @model_validator(mode="after")
    def _are_all_there(self) -> Self:
        for lengths in (self.prompt, self.chosen, self.rejected):
            if lengths.keys() != {*QUANTILES, "mean"}:
                raise ValueError
        return self


_LengthAndCount = Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _TooLong(_Facts):
    prompt: list[_LengthAndCount]
    chosen: list[_LengthAndCount]
    rejected: list[_LengthAndCount]
    longest: list[_LengthAndCount]


class _Source(_Facts):
    source: str
    shape: str
    rows: _Count
    pairs: _Count


class _Statistics(_Facts):
    sources: Annotated[list[_Source], Field(min_length=1)]
    rows_read: _Count
    pairs_kept: _Count
    dropped: dict[str, Annotated[_Count, Field(ge=1)]]
    examples: dict[str, list[str]]
    tokens: _Quantiles
    too_long: _TooLong

    @model_validator(mode="after")
    def _have_reasons(self) -> Self:
        if not self.examples.keys() <= self.dropped.keys():
            raise ValueError
        return self


class _Manifest(_Facts):
    fingerprint: str
    settings: dict[str, str | int | None]
    statistics: _Statistics


_counts = TypeAdapter(dict[str, _Count])


def problem_of_manifest(manifest: Mapping[str, Any], num_pairs: int) -> str:
    """Say what is wrong with a manifest of so many prepared pairs, or nothing."""
    try:
        stated = _Manifest.model_validate(manifest).statistics
        _counts.validate_python({name: manifest["statistics"].get(name) for name in COUNTED}, strict=True)
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False, include_context=False)[0]["loc"]))
        return f"`{printable(place)}` is not what `prepare-data` writes"
    if stated.pairs_kept != num_pairs:
        return f"it speaks of {stated.pairs_kept} pairs, and there are {num_pairs}"
    return ""


def problem_of_rows(rows: pa.RecordBatch) -> str:
    """Say what is wrong with some rows of the right columns, or nothing."""
    try:
        # Arrow believes a file's offsets; false ones lead out of its memory.
        rows.validate(full=True)
    except pa.ArrowException as error:
        return printable(error, 200)
    tokens = [rows.column(name) for name in ("prompt", "chosen", "rejected")]
    gaps = [rows.column(name) for name in ("chosen_gaps", "rejected_gaps")]
    if any(column.null_count for column in (*rows.columns, *(column.flatten() for column in (*tokens, *gaps)))):
        return "values are missing"
    if any((_counts_of(column) < 1).any() or column.flatten().to_numpy().min(initial=0) < 0 for column in tokens):
        return "there are texts without tokens, or tokens below 0"
    if not all(map(_are_within, gaps, tokens[1:])):
        return "what is not judged of a response lies outside of it"
    weights, margins = rows.column("weight").to_numpy(), rows.column("margin").to_numpy()
    if not (np.isfinite(weights) & (weights >= 0) & np.isfinite(margins)).all():
        return "weights or margins are not numbers that a row may have"
    return ""


def _counts_of(lists: pa.ListArray) -> NDArray[np.int64]:
    return np.asarray(lists.value_lengths().to_numpy(), np.int64)


def _are_within(gaps: pa.ListArray, responses: pa.ListArray) -> bool:
    """Tell whether gaps are starts and stops in ascending order, none of them behind the end of their response."""
    places, counts = gaps.flatten().to_numpy(), _counts_of(gaps)
    rows = np.repeat(np.arange(len(counts)), counts)
    ascending = (np.diff(places) >= 0) | (np.diff(rows) > 0)
    inside = (places >= 0) & (places <= _counts_of(responses)[rows])
    return bool((counts % 2 == 0).all() and ascending.all() and inside.all())
