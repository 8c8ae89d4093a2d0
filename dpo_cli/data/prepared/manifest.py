"""What the manifest of a prepared folder says beside its files: the fields that the rest of the program relies on."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_cli.data.prepared.tally import COUNTED
from dpo_cli.data.rows.fields import printable
from dpo_cli.system.text import several

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Lengths = list[Annotated[list[_Count], Field(min_length=2, max_length=2)]]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Quantiles(_Strict):
    min: float
    p50: float
    p90: float
    p99: float
    max: float
    mean: float


class _Tokens(_Strict):
    prompt: _Quantiles
    chosen: _Quantiles
    rejected: _Quantiles


class _TooLong(_Strict):
    prompt: _Lengths
    chosen: _Lengths
    rejected: _Lengths
    longest: _Lengths


class _Source(_Strict):
    source: str
    shape: str
    rows: _Count
    pairs: _Count


class _Statistics(_Strict):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Count]

    sources: Annotated[list[_Source], Field(min_length=1)]
    rows_read: _Count
    pairs_kept: _Count
    dropped: dict[str, Annotated[_Count, Field(ge=1)]]
    examples: dict[str, list[str]]
    tokens: _Tokens
    too_long: _TooLong

    @model_validator(mode="after")
    def _are_complete(self) -> Self:
        if not (self.examples.keys() <= self.dropped.keys() and COUNTED.keys() <= self.__pydantic_extra__.keys()):
            raise ValueError
        return self


class _Manifest(_Strict):
    fingerprint: str
    settings: dict[str, str | int | None]
    statistics: _Statistics


def problem_of_manifest(manifest: dict[str, Any], num_pairs: int) -> str:
    """Say what is wrong with a manifest of so many prepared pairs, or nothing."""
    try:
        stated = _Manifest.model_validate(manifest).statistics.pairs_kept
    except ValidationError as error:
        field = ".".join(map(str, error.errors(include_url=False, include_context=False)[0]["loc"]))
        return f"`{printable(field)}` is not what `prepare-data` writes"
    return f"it counts {several(stated, 'pair')}, and the folder has {num_pairs:,}" if stated != num_pairs else ""
