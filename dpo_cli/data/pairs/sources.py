"""Sources, as the settings name them, become rows: files, globs, folders and Hub ids, weighed and limited.

Sources are read independently of each other: which of its rows are used, and how often, depends on itself
alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from dpo_cli.data.pairs.renaming import ColumnNames, shown_columns
from dpo_cli.data.pairs.shapes import FORMATS
from dpo_cli.data.records import Row
from dpo_cli.data.rows.fields import listed
from dpo_cli.data.rows.files import reader_for
from dpo_cli.data.rows.paths import SPLITS, files_at
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.settings import OneOf, PathText, Settings, located
from dpo_cli.system.hub import look_up
from dpo_cli.system.storage import MANIFEST, file_digest, text_digest


class Source(Settings):
    """A source of rows, and how they are used."""

    path: PathText
    """A data file, a glob, a folder of data files or one that `datasets` or `dpo prepare-data` wrote, or a Hub id."""
    config: str | None = None
    """Which configuration of a Hub dataset."""
    split: str = "train"
    """Which split of a Hub dataset, or of a folder of several that `datasets` wrote."""
    format: Annotated[str, OneOf("auto", *FORMATS)] = "auto"
    """The shape of these rows; auto: as `data.format` says."""
    columns: ColumnNames | None = None
    """The column names of these rows, instead of `data.columns`; null: as there; {}: no mapping."""
    system: str | None = None
    """The system message of rows without one; null: that of `data.system`; an empty text: none."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often a row is used: 2 means twice, 0.5 about every second row, by its index in the source."""
    limit: int | None = Field(None, ge=1)
    """The number of rows to read from the start; null: all."""


NAME, GROUP, SEVERAL = "a path", "a source", "a list of sources"
"""What pydantic calls the ways to write sources; in no path of a setting."""


def _way(value: object) -> str | None:
    """Tell in which way one source, or several, are written."""
    if isinstance(value, str):
        return NAME
    if isinstance(value, (dict, Source)):
        return GROUP
    return SEVERAL if isinstance(value, (list, tuple)) else None


def _way_of_one(value: object) -> str | None:
    return None if isinstance(value, (list, tuple)) else _way(value)


OneSource = Annotated[
    Annotated[PathText, Tag(NAME)] | Annotated[Source, Tag(GROUP)],
    Discriminator(_way_of_one, "source", "Input should be a path or a group of settings"),
]
Sources = Annotated[
    Annotated[PathText, Tag(NAME)] | Annotated[Source, Tag(GROUP)] | Annotated[list[OneSource], Tag(SEVERAL)],
    Discriminator(_way, "sources", "Input should be a path, a group of settings, or a list of them"),
]
"""What a setting that names data accepts."""


def as_sources(named: str | Source | Sequence[str | Source] | None) -> list[Source]:
    """Return what a setting names as a list; a path by itself is a source whose other settings are the defaults."""
    several = [] if named is None else [named] if isinstance(named, (str, Source)) else named
    # What a setting or an option named is expanded already; a second time, its `$$` would be lost.
    return [Source.model_construct(path=one) if isinstance(one, str) else one for one in several]


def describe(sources: Iterable[Source]) -> str:
    """Name sources, with their settings: `pairs.jsonl, others.csv (weight 2.0)`."""
    return ", ".join(_described(source) for source in sources)


def _described(source: Source) -> str:
    said = ", ".join(
        f"{name} {shown_columns(value) if name == 'columns' else value}" for name, value in _settings(source).items()
    )
    return f"{source.path} ({said})" if said else source.path


def _settings(source: Source) -> dict[str, Any]:
    """Return the settings of a source other than its path that are not the default."""
    return source.model_dump(exclude={"path"}, exclude_defaults=True)


def check_source(source: Source, where: str | None = None) -> UserError | None:
    """Say what is wrong with a source, without reading any of its rows."""
    try:
        effective = _effective(source)
    except UserError as error:
        return UserError(error.what, where, error.hint)
    except OSError as error:
        return from_os_error(error, "looking for the data", f"{source.path[:60]}", status=2)
    if idle := sorted(_settings(source).keys() - effective):
        hint = (
            f"leave it out; settings with an effect here: {listed(sorted(effective)) if effective else 'only the path'}"
        )
        return UserError(f"`{idle[0]}` has no effect on `{source.path}`", where, hint)
    return None


def _effective(source: Source) -> set[str]:
    """Return the settings that have an effect on what a source names, which must be there."""
    files, path = files_at(source.path, source.split), Path(source.path)
    settings = Source.model_fields.keys() - {"path"}
    if (path / MANIFEST).is_file():
        return set()
    if (path / SPLITS).is_file():
        return settings - {"config"}
    return settings if files is None else settings - {"config", "split"}


def look_up_source(source: Source, where: str) -> UserError | None:
    """Say what is wrong with a source that is a dataset of the Hub, before any of its rows is loaded."""
    try:
        if files_at(source.path, source.split) is None:
            look_up("dataset", source.path, where)
            _opened(source, lambda load: load.load_dataset_builder(source.path, source.config))
    except UserError as error:
        return UserError(error.what, where, error.hint)
    return None


def paths_of(source: Source) -> list[str]:
    """Return the name of a source, and the files behind it, if there are any."""
    try:
        files = files_at(source.path, source.split) or []
    except (UserError, OSError):
        files = []
    return [source.path, *map(str, files)]


def read_rows(source: Source) -> Iterator[Row]:
    """Yield the rows of a source, up to its limit.

    Raises:
        UserError: The source does not exist, or cannot be read beyond some point.
    """
    if problem := check_source(source):
        raise problem
    try:
        yield from itertools.islice(_all_rows(source), source.limit)
    except OSError as error:
        raise from_os_error(error, "reading the data", source.path, status=2) from error


def weighted(rows: Iterable[Row], weight: float) -> Iterator[Row]:
    """Yield each row as often as a weight says, copies one after the other.

    Args:
        rows: The rows of a source, each of which is as good as any other: those that are pairs together, put together.
        weight: How often a row is used, on average.
    """
    for number, row in enumerate(rows):
        # What is broken is reported once, whatever the weight.
        if times := _times(number, weight) if row.values is not None else 1:
            yield row
            if times > 1:
                yield from itertools.repeat(dataclasses.replace(row, copy=True), times - 1)


def source_digest(source: Source) -> str:
    """Return a digest that changes whenever other rows would be read: of the content and of its settings."""
    if problem := check_source(source):
        raise problem
    settings = json.dumps(_settings(source), sort_keys=True)
    files = files_at(source.path, source.split)
    try:
        if files is None:
            return text_digest(settings, str(_load_dataset(source)._fingerprint))
        if len(files) == 1:
            return text_digest(settings, file_digest(files[0]))
        return text_digest(settings, *(f"{file} {file_digest(file)}" for file in files))
    except OSError as error:
        raise from_os_error(error, "reading the data", source.path, status=2) from error


def _all_rows(source: Source) -> Iterator[Row]:
    """Yield every row of a source once."""
    files = files_at(source.path, source.split)
    if files is None:
        yield from _dataset_rows(source)
    for file in files or ():
        if reader := reader_for(file):
            yield from reader(file)


def _dataset_rows(source: Source) -> Iterator[Row]:
    # Sources are checked long before one is read: Arrow is imported then.
    from dpo_cli.data.rows.column_files import BATCH_ROWS, rows_of_columns

    name = "/".join(part for part in (source.path, source.config, source.split) if part)
    yield from rows_of_columns(name, "dataset", _load_dataset(source).with_format("arrow").iter(batch_size=BATCH_ROWS))


def _times(number: int, weight: float) -> int:
    """Return how often a row is used, by its number in the source; on average `weight` times."""
    whole, share = divmod(weight, 1)
    if not share:
        return int(whole)
    drawn = hashlib.blake2b(str(number).encode(), digest_size=8).digest()
    return int(whole) + (int.from_bytes(drawn, "big") < share * 2**64)


def _load_dataset(source: Source) -> Any:
    """Load a split of a Hub dataset, which stays on disk."""
    return _opened(source, lambda load: load.load_dataset(source.path, source.config, split=source.split))


def _opened(source: Source, load: Callable[[Any], Any]) -> Any:
    """Call the library of the Hub's datasets; render what it says when it cannot."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load(datasets)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = (
            f"there is no file or folder {located(source.path)}; check name, configuration and split of a Hub dataset: "
            "it needs the network, unless it was loaded before"
        )
        raise UserError(f"`{source.path}` cannot be loaded: {reason}", source.path, hint) from error
